#!/usr/bin/env python3
"""How a step's time grows with tokens, width, depth, shards, rank and threads: a table, a fit and a picture.

    cargo build --release --example llama_math
    python3 benches/end_to_end/growth.py --json growth.json --svg book/src/growth.svg

Trains Llamas with random weights, one setting changed at a time, each in a run of its own. The time of a setting is the
shortest of its steps after the first. Nothing but Python's standard library is needed.
"""
import argparse
import array
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile

from run import machine

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = os.path.join(HERE, "../../examples/llama_math/assets/tiny")
BASE = {"tokens": 128, "width": 256, "depth": 4, "shards": 4, "rank": 8, "threads": 2}
SWEEPS = {
    "tokens": [32, 64, 128, 256, 512],
    "width": [128, 256, 512, 1024],
    "depth": [2, 4, 8, 16],
    "shards": [1, 2, 4, 8, 16],
    "rank": [2, 4, 8, 16, 32],
    "threads": [1, 2],
}
HEAD = 64


def model(folder, width, depth):
    """A checkpoint with random weights, and the tokenizer of the embedded model."""
    os.makedirs(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(TINY, name), folder)
    config = json.load(open(os.path.join(TINY, "config.json")))
    config.update(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, head_dim=HEAD,
                  num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, max_position_embeddings=1024,
                  torch_dtype="float32")
    json.dump(config, open(os.path.join(folder, "config.json"), "w"))
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], width], "model.norm.weight": [width]}
    for layer in range(depth):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = [width]
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = [width, width]
        for name, shape in [("gate", [3 * width, width]), ("up", [3 * width, width]), ("down", [width, 3 * width])]:
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
    # Some normal numbers over and over: a length without common divisors keeps the matrices of full rank.
    rng = random.Random(0)
    numbers = array.array("f", (rng.gauss(0, 0.02) for _ in range(100_003)))
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        offset = 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            values = array.array("f", [1.0]) * count if len(shape) == 1 else array.array("f")
            while len(values) < count:
                part = numbers[offset % len(numbers):][: count - len(values)]
                values.extend(part)
                offset += len(part)
            values.tofile(file)


def seconds(args, folder, setting):
    """Seconds of a step."""
    name = os.path.join(folder, f"{setting['width']}-{setting['depth']}")
    if not os.path.isdir(name):
        model(name, setting["width"], setting["depth"])
    data = os.path.join(folder, "data.jsonl")
    with open(data, "w") as file:
        rng = random.Random(1)
        for _ in range(setting["shards"] * args.steps):
            words = " ".join(str(rng.randrange(1000)) for _ in range(600))
            file.write(json.dumps({"instruction": "Say", "output": words}) + "\n")
    prompt = os.path.join(folder, "prompt.txt")
    with open(prompt, "w") as file:
        file.write("{instruction}")
    output = os.path.join(folder, "output")
    shutil.rmtree(output, ignore_errors=True)
    command = [args.llama_math, "--model", name, "--data", data, "--output", output, "--published", "--no-cache",
               "--shards", setting["shards"], "--rank", setting["rank"], "--max-length", setting["tokens"],
               "--steps", args.steps, "--batch-size", 1, "--no-shuffle", "--device", "flex",
               "--threads", setting["threads"], "--prompt-template", prompt]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(setting["threads"])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    rows = [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl"))]
    tokens = setting["shards"] * setting["tokens"]
    return min(tokens / row["tokens_per_second"] for row in rows[1:])


def terms(setting):
    """The terms of the book's formula, and attention, which it leaves out: operations of one step."""
    width, depth, tokens = setting["width"], setting["depth"], setting["tokens"]
    shards, rank, threads = setting["shards"], setting["rank"], min(setting["threads"], setting["shards"])
    matrices, sums = depth * 13 * width**2, depth * 20 * width
    passes = math.ceil(shards / threads)
    return [
        passes * tokens * 4 * (matrices + rank * sums),
        passes * depth * 12 * tokens**2 * width,
        shards * rank * sums,
        4 * shards * rank * matrices / setting["threads"],
        passes * depth * 7,
    ]


NAMES = ["projections", "attention", "optimizer", "merge", "per weight and pass"]


def fit(rows):
    """Least squares of relative errors, with constants that are not negative."""
    samples = [([t / row["seconds"] for t in terms(row)]) for row in rows]
    size = len(NAMES)
    scale = [max(sample[i] for sample in samples) for i in range(size)]
    samples = [[x / s for x, s in zip(sample, scale)] for sample in samples]
    constants = [0.1] * size
    # Coordinate descent: each step is the best value of one constant.
    for _ in range(20_000):
        for i in range(size):
            rest = [1 - sum(c * x for j, (c, x) in enumerate(zip(constants, sample)) if j != i) for sample in samples]
            above = sum(r * sample[i] for r, sample in zip(rest, samples))
            constants[i] = max(0.0, above / sum(sample[i] ** 2 for sample in samples))
    return [c / s for c, s in zip(constants, scale)]


def slope(points):
    """Exponent of the growth over the last doubling."""
    (x0, y0), (x1, y1) = points[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def picture(sweeps, constants):
    """Six panels: dots are measured, lines are the formula."""
    width, height, parts = 340, 240, []
    for index, (name, rows) in enumerate(sweeps.items()):
        left, top = 60 + index % 2 * width, 40 + index // 2 * height
        xs = [math.log2(row[name]) for row in rows]
        predicted = [sum(c * t for c, t in zip(constants, terms(row))) for row in rows]
        values = [row["seconds"] for row in rows] + predicted
        low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
        x = lambda v: left + 10 + (v - xs[0]) / max(xs[-1] - xs[0], 1e-9) * (width - 110)
        y = lambda v: top + (high - math.log10(v)) / (high - low) * (height - 90)
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, predicted))
        parts.append(f'<text x="{left}" y="{top - 12}" font-weight="bold">{name}</text>')
        parts.append(f'<path d="M{left} {top}V{top + height - 90}H{left + width - 90}" fill="none" stroke="currentColor" '
                     'stroke-opacity="0.4"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="#d55e00" stroke-width="2"/>')
        for row, at in zip(rows, xs):
            parts.append(f'<circle cx="{x(at):.1f}" cy="{y(row["seconds"]):.1f}" r="4.5" fill="#2a8fd0"/>')
            parts.append(f'<text x="{x(at):.1f}" y="{top + height - 70}" text-anchor="middle">{row[name]}</text>')
        for value in (min(values), max(values)):
            label = f"{value:.2g} s" if value >= 1 else f"{1000 * value:.0f} ms"
            parts.append(f'<text x="{left - 6}" y="{y(value) + 5:.1f}" text-anchor="end">{label}</text>')
    total = 40 + (len(sweeps) + 1) // 2 * height
    text = "".join(parts)
    title = "Time of a step by tokens, width, depth, shards, rank and threads: measured dots on the formula's lines"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 20} {total}" role="img" '
            f'aria-label="{title}" font-family="sans-serif" font-size="15" fill="currentColor"><title>{title}</title>'
            '<style>svg { color: #1b1b1b; background: #fff } @media (prefers-color-scheme: dark) '
            f'{{ svg {{ color: #e8e8e8; background: #16181c }} }}</style>{text}</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-math", default="target/release/examples/llama_math")
    parser.add_argument("--json", default="growth.json")
    parser.add_argument("--svg")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    known, sweeps = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in SWEEPS.items():
            sweeps[name] = []
            for value in values:
                setting = {**BASE, name: value}
                key = tuple(setting.values())
                if key not in known:
                    known[key] = seconds(args, folder, setting)
                sweeps[name].append({**setting, "seconds": known[key]})
    rows = [row for rows in sweeps.values() for row in rows]
    constants = fit(rows)
    print(f"{machine()}; {', '.join(f'{k} {v}' for k, v in BASE.items())}, one of them changed at a time\n")
    worst = 0.0
    for name, own in sweeps.items():
        print(f"{name:>8} {'measured':>10} {'formula':>10} {'error':>7}")
        for row in own:
            predicted = sum(c * t for c, t in zip(constants, terms(row)))
            error = predicted / row["seconds"] - 1
            worst = max(worst, abs(error))
            print(f"{row[name]:8} {1000 * row['seconds']:8.1f}ms {1000 * predicted:8.1f}ms {100 * error:+6.0f}%")
        print(f"         exponent over the last doubling: {slope([(r[name], r['seconds']) for r in own]):.2f}\n")
    for name, constant in zip(NAMES, constants):
        rate = f"{1e-9 / constant:.1f} Gop/s" if constant > 0 else "no time"
        print(f"{name:20} {rate if 'weight' not in name else f'{1e6 * constant:.1f} us'}")
    print(f"largest error: {100 * worst:.0f} %")
    result = {"machine": machine(), "base": BASE, "sweeps": sweeps, "constants": dict(zip(NAMES, constants))}
    with open(args.json, "w") as file:
        json.dump(result, file, indent=1)
    if args.svg:
        with open(args.svg, "w") as file:
            file.write(picture(sweeps, constants))


if __name__ == "__main__":
    main()
