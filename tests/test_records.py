"""Record ids: frozen, since every run of every machine must give the same."""

import hashlib
import json
import random

from slmfast.records import record_id


def test_an_id_is_the_hash_of_the_content_as_json():
    rng = random.Random(1)
    text = lambda: "".join(rng.choice('ab"\\\n\t\x00\x1f\x7f/é好😀\u2028') for _ in range(rng.randint(0, 9)))  # noqa: E731
    for _ in range(500):
        source, reply = text(), text()
        prompt = [{"role": rng.choice(["user", "assistant"]), "content": text()} for _ in range(rng.randint(0, 3))]
        content = json.dumps([source, [[m["role"], m["content"]] for m in prompt], reply], ensure_ascii=False)
        assert record_id(source, prompt, reply) == hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
