"""`python -m llmboost`: the command line."""

from llmboost.cli import main

main()
