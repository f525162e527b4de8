"""Replaces the answers in conversations by the target's own, with any number of engines.

A draft learns to propose what the target would say, so it should be trained on what the target said. User and system
turns are kept; the target writes each assistant turn anew, following its own earlier answers; a conversation that ends
with a user turn gets an answer.

An answer that reaches `max_new_tokens` has no end, but a chat template would write one, and it would be trained
although the target never said it. So such a conversation is left out, or kept with a mark that the corpus respects.

- `rows`, `speaker`, `fit`, `parsers`: convert a row to the row with answers, which `data` reads back token for token.
- `voices`, `engine`: the sources of answers, and the loop of an engine, in any process on any node.
- `prompts`, `shards`: assign prompts and store answers, on the head (`specbatch.run.answering`).
"""
