"""Reading a user's network without changing it."""
