"""The heart: passes over a span of decoder layers, attached to a stock transformers model by hooks.

config    what a recursion is (no torch)        cell      the modules that it adds
families  where each architecture keeps things  caches    every pass has its own cache
engine    `attach` and the passes themselves    losses    what training minimises
chunked   decoding: draft, refine, commit       chunks    its metrics, from teacher-forced passes
rows      the batch that it works on            readout   from hidden states to logits
tiles     the head, a tile at a time            lora      adapters for the passes (peft)
proof     what unknown families have to show                      selftest  a tiny model that shows it in a second
"""
