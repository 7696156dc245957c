"""How many of 200 random JSON schemas are followed: the real engine at temperature 1, through the API, each answer parsed and validated.

    python -m benchmarks.json_schemas MODEL.gguf [--count 200] [--seed 1]

The schemas are of the subset that docs/api.md names: types, required, enum, const, bounded strings, arrays and integers, anyOf, $ref; at most three
levels deep, with three properties on average or more.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Json = dict[str, Any]
NAMES = ("name", "age", "town", "tags", "kind", "size", "colour", "note", "count", "owner")


def schema(random: random.Random) -> Json:
    """A random schema: an object of 3 to 5 properties; one of its definitions is referred to."""
    made = _object(random, 3)
    made["$defs"] = {"short": {"type": "string", "maxLength": 12}}
    made["properties"]["also"] = {"$ref": "#/$defs/short"}
    made["required"].append("also")
    return made


def _object(random: random.Random, depth: int) -> Json:
    names = random.sample(NAMES, random.randint(3, 5))
    required = random.sample(names, random.randint(1, len(names)))
    return {"type": "object", "properties": {name: _value(random, depth - 1) for name in names}, "required": required, "additionalProperties": False}


def _value(random: random.Random, depth: int) -> Json:
    low = random.randint(-20, 20)
    leaves: list[Json] = [
        {"type": "string", "maxLength": random.randint(3, 20)},
        {"type": "string", "minLength": 1, "maxLength": 15},
        {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 500)},
        {"type": "integer"},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": random.sample(["red", "green", "blue", 1, 2, None, True], 3)},
        {"const": random.choice(["fixed", 7, False])},
        {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "integer", "minimum": 0, "maximum": 9}]},
        {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 3},
    ]
    if depth > 0 and random.random() < 0.25:
        return _object(random, depth)
    return random.choice(leaves)


def fault(url: str, wanted: Json, seed: int) -> str:
    """What is wrong with the model's answer to `wanted`; "" when it parses and validates."""
    import httpx
    import jsonschema

    body = {
        "messages": [{"role": "user", "content": "Invent an example."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": wanted}},
        "temperature": 1,
        "top_p": 1,
        "seed": seed,
        "max_tokens": 1500,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    if response.status_code != 200:
        return response.text[:300]
    choice = response.json()["choices"][0]
    try:
        jsonschema.validate(json.loads(choice["message"]["content"]), wanted)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{choice['finish_reason']}: {str(error)[:200]} in {choice['message']['content'][:200]}"
    return ""


def main() -> None:
    """Ask and print."""
    from benchmarks.api import built
    from modules.api.server import ApiServer, build_api
    from modules.guard import Hosts
    from modules.listening import claim

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = built(Path(folder), Path(arguments.model), 4)
        listener = claim("127.0.0.1", 0)
        server = ApiServer(build_api(made, lambda: Hosts.build(False)), listener)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        source, good, properties = random.Random(arguments.seed), 0, 0
        for number in range(arguments.count):
            wanted = schema(source)
            properties += len(wanted["properties"])
            wrong = fault(url, wanted, number)
            good += not wrong
            if wrong:
                print(f"{number}: {wrong}\n   {json.dumps(wanted)}", flush=True)
        print(f"{good} of {arguments.count} answers follow their schema ({properties / arguments.count:.1f} properties at the root on average)")
        server.stop()
        made.close()


if __name__ == "__main__":
    main()
