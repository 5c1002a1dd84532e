"""Other forms of law, and the choice between them."""
