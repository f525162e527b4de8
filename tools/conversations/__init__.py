"""The quickstart's conversations: prompts under free licences, and the target's own answers to them."""
