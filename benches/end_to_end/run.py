#!/usr/bin/env python3
"""Compares whole training runs of llama_math with the same work in PyTorch: one table, one JSON file.

    cargo build --release --example llama_math
    python3 benches/end_to_end/run.py --model SMOLLM2 --data train.jsonl --json end_to_end.json

--model is a checkpoint of SmolLM2-135M or another Llama in f32, --data is GSM8K. The rows of PyTorch need a Python with
torch, transformers and peft (--python names it, this one by default). Without them the table leaves these rows out
and says so. Every way takes the same records in the same order. The first step of a run is not timed. Ways alternate
for --rounds rounds, and the table has medians. Only ratios from one run on an idle machine are meaningful.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{}\n\n### Response:")
# Name, shards, records of a micro-batch, tokens of a record.
SETTINGS = [
    ("2 shards, 1 x 256 tokens", 2, 1, 256),
    ("8 shards, 1 x 256 tokens", 8, 1, 256),
    ("2 shards, 4 x 128 tokens", 2, 4, 128),
]
TORCH_WAYS = ("frozen", "lora", "wide lora", "published")
# Targets: name, number of shards (None for all), the ratio, the bound, and whether it is an upper bound.
TARGETS = [
    ("tokens/s, ours / published", None, ("ours", "published", "tokens_per_s"), 2.2, False),
    ("tokens/s, ours / PEFT LoRA", None, ("ours", "lora", "tokens_per_s"), 1.25, False),
    ("tokens/s, ours / frozen", None, ("ours", "frozen", "tokens_per_s"), 1.0, False),
    ("tokens/s, shared / per-shard gradients", None, ("shared", "ours", "tokens_per_s"), 1 / 0.9, False),
    ("tokens/s, two cores / one", None, ("ours", "one thread", "tokens_per_s"), 1.8, False),
    ("peak memory, ours / published", None, ("ours", "published", "peak_mib"), 0.4, True),
    ("peak memory, ours / PEFT LoRA", None, ("ours", "lora", "peak_mib"), 0.55, True),
    ("preparation, ours / published", 2, ("ours", "published", "preparation_s"), 0.5, True),
    ("preparation, ours / published", 8, ("ours", "published", "preparation_s"), 0.13, True),
    ("preparation, resumed / fresh", None, ("resumed", "ours", "preparation_s"), 0.3, True),
]


def long_records(source, count):
    """Records of several problems each, which fill any length in SETTINGS."""
    rows = [json.loads(line) for line in open(source)]
    for first, second, third in zip(rows[0::3], rows[1::3], rows[2::3]):
        parts = [first["answer"], second["question"], second["answer"], third["answer"], third["question"]]
        yield {"question": first["question"], "answer": "\n".join(parts)}
        count -= 1
        if count == 0:
            return


def ours(args, setting, folder, way):
    _, shards, batch, length = setting
    output = os.path.join(folder, "output")
    shutil.rmtree(output, ignore_errors=True)
    # With shared gradients a step has the same records in fewer, larger micro-batches.
    feed = ["--published", "--batch-size", str(batch)]
    if way == "shared":
        together = max(1, shards // args.threads)
        feed = ["--gradients", "shared", "--batch-size", str(batch * together), "--accumulation", str(shards // together)]
    threads = 1 if way == "one thread" else args.threads
    command = [args.llama_math, "--model", args.model, "--data", os.path.join(folder, "data.jsonl"), "--output", output,
               "--method", "hd-pissa", "--shards", str(shards), "--rank", "16", "--max-length", str(length),
               "--steps", str(args.steps), "--no-shuffle", "--no-cache", "--device", "flex", "--threads", str(threads)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads)}

    def call(extra):
        done = subprocess.run(command + feed + extra, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command + feed + extra)}\n{done.stderr}")
        return done.stdout + done.stderr

    if way == "resumed":
        checkpoints = os.path.join(folder, "checkpoints")
        shutil.rmtree(checkpoints, ignore_errors=True)
        place = ["--checkpoints", checkpoints]
        first = command + feed + place + ["--save-every", "1"]
        if not stop_at_first_checkpoint(first, checkpoints, environment):
            sys.exit(f"{' '.join(first)}\ndid not stop at its first checkpoint")
        text = call(place + ["--resume"])
    else:
        text = call([])
    steps = [json.loads(line) for line in open(os.path.join(output, "metrics.jsonl"))]
    found = re.search(r"after ([\d.]+) s of preparation.*peak memory (\d+) MiB", text)
    return {
        "tokens_per_s": statistics.median(step["tokens_per_second"] for step in steps[1:]),
        "preparation_s": float(found[1]),
        "peak_mib": float(found[2]),
        "losses": [step["loss"] for step in steps],
    }


def stop_at_first_checkpoint(command, folder, environment):
    """Runs until there is a checkpoint, then asks the program to end."""
    import signal
    import time

    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while run.poll() is None:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if any(name.startswith("step-") for name in names):
            run.send_signal(signal.SIGTERM)
            return run.wait() == 0
        time.sleep(0.05)
    return False


def torch_side(args, setting, folder, way):
    _, shards, batch, _ = setting
    # The wide LoRA has as many trainable values as all shards.
    method, rank = ("lora", 16 * shards) if way == "wide lora" else (way, 16)
    command = [args.python, os.path.join(HERE, "torch_side.py"), method, "--model", args.model,
               "--sequences", os.path.join(folder, "sequences.jsonl"), "--shards", str(shards), "--batch", str(batch),
               "--steps", str(args.steps), "--threads", str(args.threads), "--rank", str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def encode(args, setting, folder):
    """The sequences of the records for PyTorch, cut to the length of llama_math's."""
    program = ("import json, sys; from transformers import AutoTokenizer as T; t = T.from_pretrained(sys.argv[1])\n"
               "for line in open(sys.argv[2]):\n"
               "    r = json.loads(line); p = sys.argv[4].format(r['question'])\n"
               "    ids = t(p + r['answer'])['input_ids'][:int(sys.argv[3])]\n"
               "    print(json.dumps({'ids': ids, 'prompt_length': len(t(p)['input_ids'])}))\n")
    command = [args.python, "-c", program, args.model, os.path.join(folder, "data.jsonl"), str(setting[3]), PROMPT]
    with open(os.path.join(folder, "sequences.jsonl"), "w") as file:
        subprocess.run(command, check=True, stdout=file)


def machine():
    try:
        text = open("/proc/cpuinfo").read()
    except OSError:
        return "unknown"
    names = re.findall(r"model name\s*: (.*)", text)
    return f"{len(names)} x {names[0]}" if names else "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--llama-math", default="target/release/examples/llama_math")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json", default="end_to_end.json")
    parser.add_argument("--settings", type=int, nargs="*", default=range(len(SETTINGS)), help="by number, from 0")
    parser.add_argument("--ways", nargs="*", help="only these")
    for name, default in [("steps", 6), ("rounds", 2), ("threads", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: the first step is not timed")
    probe = [args.python, "-c", "import torch, transformers, peft"]
    has_torch = subprocess.run(probe, capture_output=True).returncode == 0
    ways = ["ours", "shared", "one thread", "resumed"] + (list(TORCH_WAYS) if has_torch else [])
    ways = [way for way in ways if args.ways is None or way in args.ways]

    result = {"machine": machine(), "load_before": os.getloadavg()[0], "steps": args.steps, "settings": {}}
    for setting in (SETTINGS[index] for index in args.settings):
        name, shards, batch, _ = setting
        rows = result["settings"][name] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "data.jsonl"), "w") as file:
                for record in long_records(args.data, shards * batch * args.steps):
                    file.write(json.dumps(record) + "\n")
            if has_torch:
                encode(args, setting, folder)
            for _ in range(args.rounds):
                for way in ways:
                    side = torch_side if way in TORCH_WAYS else ours
                    rows[way].append(side(args, setting, folder, way))
        print(f"\n{name}, rank 16, {args.threads} threads\n{'':12}{'tokens/s':>10}{'prepared in':>13}{'peak':>11}")
        for way, found in rows.items():
            if found:
                row = [statistics.median(run[key] for run in found) for key in ("tokens_per_s", "preparation_s", "peak_mib")]
                print(f"{way:12}{row[0]:10.0f}{row[1]:11.1f} s{row[2]:7.0f} MiB")
        if rows.get("published"):
            passes = statistics.median(run["preparation_s"] for run in rows["published"]) / shards
            print(f"published: each of its {shards} processes decomposes every weight, {passes:.1f} s each")
        losses = [rows[way][0]["losses"][0] for way in ("ours", "published") if rows.get(way)]
        if len(losses) == 2:
            print(f"loss of the first step, ours and published: {losses[0]:.5f}, {losses[1]:.5f}")
    if not has_torch:
        print(f"\nwithout the rows of PyTorch: {args.python} has no torch, transformers and peft")

    print(f"\n{result['machine']}, load {result['load_before']:.1f} before the run")
    result["targets"] = []
    for name, of_shards, (above, below, key), wanted, is_upper in TARGETS:
        for setting, rows in result["settings"].items():
            if (of_shards and not setting.startswith(str(of_shards))) or not (rows.get(above) and rows.get(below)):
                continue
            # Runs of one round belong together.
            ratio = statistics.median(x[key] / y[key] for x, y in zip(rows[above], rows[below]))
            met = ratio <= wanted if is_upper else ratio >= wanted
            result["targets"].append({"name": name, "setting": setting, "ratio": ratio, "wanted": wanted, "met": met})
            bound = f"{'<=' if is_upper else '>='} {wanted:.2f}"
            print(f"{name:42}{setting:28}{ratio:7.2f}  {bound}  {'met' if met else 'MISSED'}")
    with open(args.json, "w") as file:
        json.dump(result, file, indent=1)
    print(f"written: {args.json}")


if __name__ == "__main__":
    main()
