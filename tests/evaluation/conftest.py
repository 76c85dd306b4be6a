"""A model as HFLM has it and as we have it, and what both answer."""

import logging

import pytest


@pytest.fixture(scope="session")
def hflm():
    """A function from a model and its tokenizer to lm-eval's own HFLM in fp32, one item at a time unless said.

    In a batch HFLM goes on with a reply after its end until all have ended: one at a time is what the others tend to.
    """

    def build(model, tokenizer, batch_size=1):
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")

    return build


@pytest.fixture(scope="session")
def answers():
    """A function from a language model, settings and folders to lm-eval's results with all samples."""

    def answer(language_model, settings, cache, folder=None, data=None):
        from lm_eval.evaluator import evaluate

        from slmfast.evaluation.run import load_tasks

        return evaluate(
            lm=language_model,
            task_dict=load_tasks(settings, folder, cache, data),
            limit=settings.limit,
            apply_chat_template=settings.templated,
            log_samples=True,
            bootstrap_iters=0,
        )

    return answer


@pytest.fixture(scope="session")
def same():
    """A function that compares two results item by item, and gives how many items were compared."""

    def compare(ours, theirs):
        items = 0
        assert ours["samples"].keys() == theirs["samples"].keys()
        for task, samples in theirs["samples"].items():
            for own, other in zip(ours["samples"][task], samples, strict=True):
                assert (own["doc_id"], own["arguments"]) == (other["doc_id"], other["arguments"])
                for (mine,), (its,) in zip(own["resps"], other["resps"], strict=True):
                    if isinstance(its, str):
                        assert mine == its
                    else:
                        assert mine[0] == pytest.approx(its[0], abs=1e-4)
                        assert mine[1] == its[1]
                for metric in other["metrics"]:
                    assert own[metric] == other[metric]
                items += 1
        assert ours["results"].keys() == theirs["results"].keys()
        return items

    return compare
