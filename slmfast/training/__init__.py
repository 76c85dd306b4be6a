"""SFT and KTO at learning rates whose steps a bf16 weight cannot hold.

settings        what a run is told: TrainSettings, imported without torch
data            Parquet in TRL's format -> token ids, groups, the order of the epochs
passes          a model over pairs of prompt and completion, in packs, with gradients or without
layers          what a model's layers do while it trains
logprobs        log-probabilities of completions, the head applied where a target asks for it
pack_budget     how many tokens a pack has, and what happens where the memory does not hold it
sft, kto        the two objectives, with the public entries train_sft and train_kto
kto_loss        KTO's formula, public as slmfast.kto_loss
optimizer       AdamW on fp32 masters with compensated large weights; the schedule
split_weights   fp32 masters in two halves, and what linear layers compute with them
split_adamw     AdamW with 8-bit states on such masters
forward_sees    what share of a run's update its forward pass has seen
trainer         transformers.Trainer whose batch is a whole step
run             one run from its arguments to a complete model folder
checkpoint      exact, checked checkpoints in safetensors and JSON
"""
