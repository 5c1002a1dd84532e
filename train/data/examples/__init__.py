"""Examples to fine-tune on: conversations, preferences, ratings and prompts, with a mask of what is trained."""
