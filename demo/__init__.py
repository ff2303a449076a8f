"""The demo model: a tiny language model that is made, trained and judged by the scripts in this package."""
