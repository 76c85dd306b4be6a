"""SFT and KTO at learning rates whose steps a bf16 weight cannot hold.

settings        what a run is told: TrainSettings, imported without torch
data            Parquet in TRL's format -> token ids, micro-batches, the order of the epochs
logprobs        log-probabilities of labelled tokens, the head applied to those positions alone
sft, kto        the two losses, with the public entries train_sft and train_kto
optimizer       AdamW on fp32 masters with compensated large weights, in fp32 or with 8-bit states; the schedule
split_weights   fp32 masters as bf16 weights and the 16 bits below them
split_adamw     AdamW on split weights with 8-bit states
trainer         transformers.Trainer whose batch is a whole step
run             one run from its arguments to a complete model folder
checkpoint      exact, checked checkpoints in safetensors and JSON
"""
