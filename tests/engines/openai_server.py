"""A server of OpenAI's protocol for tests, a program of its own on 127.0.0.1: faulty, slow or honest as it is told.

    python openai_server.py '{"faults": {"429": 0.1}, "seed": 1}'

prints its port and serves until it is ended. It answers a prompt by a rule of its text, or with one of slmfast's own
engines ("model": a folder). What holds a word of REFUSED is refused with that status, or all of it ("refuse": status).
`GET /stats` tells what it has been asked and what it has answered.
"""

import asyncio
import json
import random
import sys
from collections import Counter

from aiohttp import web

KINDS = ("429", "500", "hang", "cut", "garbage", "missing", "odd", "scoreless")
ODD = [  # JSON, but no answer
    "[" * 100_000,
    '{"choices": [{"message": {"content": [{"text": "a"}]}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}',
    '{"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}',
    '{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": [1]}',
    '{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": Infinity}}',
    '{"choices": null}',
    "null",
]

REFUSED = {"BAD": 400, "LARGE": 413, "MALFORMED": 422, "ILLEGAL": 451}


class Server:
    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.get("seed", 0))
        self.asked, self.answered, self.faults = Counter(), Counter(), Counter()
        self.bodies, self.keys = [], Counter()
        self.now = self.most = self.listed = 0
        self.slots = asyncio.Semaphore(options.get("slots", 1_000_000))
        self.engine = None
        if "model" in options:
            import torch

            from slmfast.engines import open_engine

            torch.set_num_threads(1)
            self.engine = open_engine("local", options["model"], threads=1)

    def fault(self):
        draw = self.random.random()
        for kind in KINDS:
            draw -= self.options.get("faults", {}).get(kind, 0.0)
            if draw < 0:
                self.faults[kind] += 1
                return kind
        return None

    async def chat(self, request):
        return await self.answer(request, self.chat_answer)

    async def completion(self, request):
        return await self.answer(request, self.completion_answer)

    async def answer(self, request, make):
        body = await request.json()
        self.keys[request.headers.get("Authorization", "")] += 1
        key = self.options.get("key")
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            said = f"Incorrect API key: {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": said}}, status=401)
        if body["model"] != self.options.get("name", "served"):
            return web.json_response({"error": {"message": "The model does not exist."}}, status=404)
        asked = json.dumps(body.get("messages", body.get("prompt")), ensure_ascii=False)
        self.asked[asked] += 1
        if self.options.get("keep_bodies"):
            self.bodies.append(body)
        if (status := self.options.get("refuse") or self.refusal(body)) is not None:
            said = f"content filter, as {request.headers.get('Authorization')} may know"
            return web.json_response({"error": {"message": said}}, status=status)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            async with self.slots:
                return await self.faulty(request, body, asked, make)
        finally:
            self.now -= 1

    def refusal(self, body):
        """The status that refuses a prompt, also one of token ids."""
        text = str(body.get("messages")) if "messages" in body else self.engine.encoder.tokenizer.decode(body["prompt"])
        return next((status for word, status in REFUSED.items() if word in text), None)

    async def faulty(self, request, body, asked, make):
        kind = self.fault()
        if kind == "429":
            return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": "0.02"})
        if kind == "500":
            return web.Response(text="internal", status=500)
        if kind == "hang":
            await asyncio.sleep(3600)
        answer = make(body)
        if kind == "garbage":
            return web.Response(
                text=json.dumps(answer)[: self.random.randrange(2, 60)], content_type="application/json"
            )
        if kind == "odd":
            return web.Response(text=ODD[self.faults[kind] % len(ODD)], content_type="application/json")
        if kind == "scoreless":
            del answer["choices"][0]["logprobs"]
        if kind == "missing":
            del answer["choices"][0]
        await asyncio.sleep(self.options.get("seconds", 0) * (1 + self.random.random() * self.options.get("spread", 0)))
        if kind == "cut":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            request.transport.close()
            return response
        if kind is None:
            self.answered[asked] += 1
        return web.json_response(answer)

    def chat_answer(self, body):
        messages = body["messages"]
        finish, text = "stop", f"reply to {messages[-1]['content']}"
        tokens = len(text.split())
        if self.engine is not None:
            options = {name: body[name] for name in ("temperature", "top_p", "seed")}
            reply = self.engine.generate([messages], max_new_tokens=body["max_tokens"], **options)[0]
            text, finish, tokens = reply.text, reply.finish_reason, reply.tokens
        message = {"role": "assistant", "content": text}
        for word, reason in (("CUT", "length"), ("FILTER", "content_filter"), ("ABORT", "abort")):
            if word in messages[-1]["content"]:
                finish = reason
        if "REFUSE" in messages[-1]["content"]:
            message |= {"content": None, "refusal": "I can't help with that."}
        if "SURROGATE" in messages[-1]["content"]:
            message["content"] = "half \ud83d and \x00 whole \U0001f600"
        usage = {"prompt_tokens": len(str(messages)), "completion_tokens": tokens} | self.options.get("usage", {})
        return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}

    def completion_answer(self, body):
        """Log-probabilities of the given tokens as vLLM gives them, or of the new one alone as llama.cpp does."""
        import torch

        ids = body["prompt"]
        with torch.no_grad():
            logits = self.engine.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        new = [float(logits[-1].max())]
        prompt = [None, *(float(logits[i, token]) for i, token in enumerate(ids[1:]))]
        logprobs = {"token_logprobs": prompt + new if self.options.get("echo", True) else new}
        return {"choices": [{"text": "", "logprobs": logprobs}], "usage": {"prompt_tokens": len(ids)}}

    async def models(self, request):
        self.listed += 1
        if self.options.get("no_models"):
            raise web.HTTPNotFound
        if self.options.get("broken_models"):
            raise web.HTTPInternalServerError
        model = {"id": self.options.get("name", "served"), "max_model_len": self.options.get("max_model_len")}
        return web.json_response({"data": [model]})

    async def stats(self, request):
        names = ("asked", "answered", "faults", "keys", "bodies", "most", "listed")
        return web.json_response({name: getattr(self, name) for name in names})


async def serve(options):
    server = Server(options)
    app = web.Application(client_max_size=1 << 26)
    app.add_routes(
        [
            web.post("/v1/chat/completions", server.chat),
            web.post("/v1/completions", server.completion),
            web.get("/v1/models", server.models),
            web.get("/stats", server.stats),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.get("port", 0), backlog=1024)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
