"""The heart: passes over a span of decoder layers, attached to a stock transformers model by hooks.

config            what a recursion is (no torch)
engine            `attach`, and the passes themselves; frames: what is kept of a forward while it runs
feedback_cell     what a pass adds to the span's input
boundary_head     whether another pass is worth it
families          where each architecture keeps its parts
caches            every pass has its own cache
lora              adapters for the passes (peft)
readout, tiles    from hidden states to logits; the head, a tile at a time
products          matrix products on a CPU
flops             what runs, in FLOPs
losses            what training minimises
calibration       whether the boundary head's probabilities are right
chunk_metrics     how chunked decoding would do on known text
exits, signals    when a position stops being refined, and what the rules for that read
lag               passes that have not seen all tokens yet
chunked_decoding  a decoding method for `generate`; drafting: draft, refine, commit; rows: the batch it works on
abilities         what a model can do when it decodes, found by trying
probing           a model run piece by piece with its own cache
proof             what a family that is in no table has to show
selftest          a tiny model that shows in a second that the installation works
"""
