"""`llmboost bench`: how fast a server with OpenAI's protocol is, ours or another's."""
