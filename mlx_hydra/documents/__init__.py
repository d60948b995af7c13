"""Long documents: reading them, putting them to a model, and keeping what it digested."""
