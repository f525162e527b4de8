"""Assigns packs to engines: messages, the state machine that hands out packs, its server and its client."""
