#!/usr/bin/env python3
"""Compares greedy decoding in llama_math with transformers: tokens/s, and whether the answers are the same.

    cargo build --release --example llama_math
    python3 benches/end_to_end/answers.py --model SMOLLM2 --data train.jsonl

Both answer the same questions of GSM8K. llama_math takes 16 at once, transformers a batch of 8 that is padded on the left.
--model is a checkpoint in f32, and the Python needs torch and transformers (--python names it, this one by default).
Only ratios from one run on an idle machine are meaningful.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

from run import PROMPT, machine

TORCH = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, data, prompt, length, batch, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
prompts = [prompt.format(json.loads(line)["question"]) for line in open(data)]
answers, start = [], time.perf_counter()
for first in range(0, len(prompts), int(batch)):
    inputs = tokenizer(prompts[first:first + int(batch)], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=int(length), pad_token_id=tokenizer.pad_token_id)
    for row in ids[:, inputs["input_ids"].shape[1]:].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        answers.append(row[:end])
seconds = time.perf_counter() - start
print(json.dumps({"tokens": sum(map(len, answers)), "seconds": seconds, "first": tokenizer.decode(answers[0])}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--llama-math", default="target/release/examples/llama_math")
    parser.add_argument("--python", default=sys.executable)
    for name, default in [("records", 32), ("tokens", 128), ("rounds", 2), ("threads", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        data, output = os.path.join(folder, "data.jsonl"), os.path.join(folder, "output")
        with open(args.data) as source, open(data, "w") as file:
            file.writelines(line for line, _ in zip(source, range(args.records)))
        environment = {**os.environ, "RAYON_NUM_THREADS": str(args.threads)}
        for _ in range(args.rounds):
            # A rate at which the model stays what it was.
            command = [args.llama_math, "--model", args.model, "--data", data, "--output", output, "--overwrite",
                       "--method", "lora", "--rank", "1", "--steps", "1", "--lr", "1e-12", "--batch-size", "1",
                       "--no-cache", "--device", "flex", "--eval", data, "--eval-samples", str(args.records),
                       "--max-new-tokens", str(args.tokens)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}\n{done.stderr}")
            text = done.stdout + done.stderr
            found = re.search(r"answers: (\d+) tokens in ([\d.]+) s", text)
            ours.append((int(found[1]), float(found[2]), text.split("\n-> ")[1].split("\n")[0]))
            command = [args.python, "-c", TORCH, args.model, data, PROMPT, str(args.tokens), "8", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            theirs.append((row["tokens"], row["seconds"], row["first"].strip().split("\n")[0]))
    print(f"{machine()}, {args.threads} threads, {args.records} records, at most {args.tokens} tokens each")
    for name, rows in [("llama_math", ours), ("transformers", theirs)]:
        for tokens, seconds, first in rows:
            print(f"{name:13}{tokens:6} tokens in {seconds:6.1f} s: {tokens / seconds:5.0f} tokens/s; first answer: {first[:60]}")
    ratio = max(o[0] / o[1] for o in ours) / max(t[0] / t[1] for t in theirs)
    print(f"greedy tokens/s, ours / transformers, best of {args.rounds}: {ratio:.2f}")


if __name__ == "__main__":
    main()
