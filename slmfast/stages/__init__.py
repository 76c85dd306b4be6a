"""The paper's steps (sections 3.2 to 4.5), one file a step, in the order in which they run.

collect · categorize · dedup · classify · diversify · regenerate · rate · align · train · fuse · evaluate · report

A stage is a module with INPUTS (the stages whose folders it reads), MODELS (the model roles it uses) and
`run(job) -> Counts`. It reads shards, calls one room of the library, and writes shards. No stage imports another. Where
it has them, `models(job)` stands for MODELS where settings decide, `files(job)` gives the digests of what it reads
besides, and `accompany(job)` brings up to date what it keeps beside its outputs.
"""
