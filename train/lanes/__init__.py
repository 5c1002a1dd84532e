"""K members of a population as the lanes of one training program: its interface, its two forms, who has which lane."""
