"""The study: what the paper's section 4 shows, over several seeds and with error bars.

From one recipe: base, S1 (SFT), S2 (KTO), S3 (SFT, then KTO), the fused model, other mixes of the three, and S1 at
other learning rates. `run` does all of it: `plan` says which models, `runs` makes and scores them, `results` reads what
they scored, `errors` turns that into means, errors and differences, `claims` holds them against the paper's statements,
`batch_size` sets the batch beside the one that the loss expects, `samples` lets the models answer, `published` has the
paper's own scores, and `page`, `tables` and `drawings` put all of it on one page.

What a seed varies. The raw files, their categories, duplicates and labels are the same for all seeds, and made once.
From the stage `vary_from` on (diversify, unless told otherwise) each seed has stages of its own: which records are
drawn for the sample and for the training sets, replies where they are sampled, KTO's order and so its pairs, and the
order of every epoch after the first. An error bar over seeds so tells how far a method's score would move if all of it
were done again on the same raw data. With the order of training alone (`--vary-from train`) it would come out too
small, since the first epoch keeps the set's order. Not varied are the base model and the items of the benchmarks: these
are a sample too, and their share of the error is found apart, by a paired bootstrap over the items. The statements are
held against both together.
"""
