"""OpenAI's Responses API: what may be asked, the object that answers, and its events."""
