"""`llmboost batch`: files of requests, answered into files by a server, seen from the shell."""
