"""Tokens and probabilities of the real engine."""

import math

import pytest


@pytest.mark.engine
def test_tokens_and_probabilities_of_the_real_engine(real_api):
    text = "The capital of France is"
    tokens = real_api.post("/v1/internal/encode", {"text": text})["tokens"]
    assert real_api.post("/v1/internal/decode", {"tokens": tokens})["text"] == text
    assert real_api.post("/v1/internal/token-count", {"text": text})["length"] == len(tokens) > 3
    real_api.post("/v1/internal/decode", {"tokens": [2**31 - 1]}, 400)
    found = real_api.post("/v1/internal/logits", {"prompt": text})
    probabilities = [each["probability"] for each in found["tokens"]]
    assert len(probabilities) == 50 and probabilities == sorted(probabilities, reverse=True) and 0.2 < sum(probabilities) <= 1.0001
    assert found["logits"] == {each["text"]: each["probability"] for each in reversed(found["tokens"])}
    answer = real_api.post("/v1/completions", {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 5})
    top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    assert {text: math.exp(value) for text, value in top.items()} == pytest.approx(dict(list(found["logits"].items())[:5]), rel=1e-3)
    end = real_api.post("/v1/internal/logits", {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"})
    assert len(end["tokens"]) == 50
