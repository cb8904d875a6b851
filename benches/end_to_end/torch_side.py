"""One way of training in PyTorch, timed step by step: prints one line of JSON.

`frozen` runs forward and backward without trainable parameters. `lora` is PEFT's LoRA with AdamW. `published`
computes the same as HD-PiSSA's published script, all shards in turn: a decomposition of every weight for each shard, a
dense b·a in every forward pass, Adam on every shard's factors, three products per shard in the update. run.py starts
it.
"""
import argparse
import json
import resource
import statistics
import time

import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The published script hides the adapter's value behind this factor, and divides the gradients by it.
HIDDEN = 1e-16


class Published(torch.nn.Module):
    """A linear layer with the factors of all shards, one of which takes the gradients of a pass."""

    def __init__(self, weight, rank, shards):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.factors, self.moments, self.shard = [], [], 0
        for start in range(0, rank * shards, rank):
            # As published: the process of each shard decomposes every weight.
            left, values, right = torch.svd(weight)
            window = slice(start, start + rank)
            root = values[window].sqrt()
            pair = ((right[:, window] * root).T.contiguous(), (left[:, window] * root).contiguous())
            self.factors.append([factor.requires_grad_() for factor in pair])
            self.moments.append([[torch.zeros_like(factor), torch.zeros_like(factor)] for factor in pair])

    def forward(self, x):
        a, b = self.factors[self.shard]
        return linear(x, self.weight) + linear(x, HIDDEN * (b @ a))

    @torch.no_grad()
    def update(self, step, lr):
        change = torch.zeros_like(self.weight)
        for pair, moments in zip(self.factors, self.moments):
            deltas = []
            for factor, (mean, square) in zip(pair, moments):
                gradient = factor.grad / HIDDEN
                mean.mul_(0.9).add_(gradient, alpha=0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                root = (square / (1 - 0.999**step)).sqrt() + 1e-8
                deltas.append(-lr * (mean / (1 - 0.9**step)) / root)
                factor.grad = None
            (a, b), (delta_a, delta_b) = pair, deltas
            change += delta_b @ a + b @ delta_a + delta_b @ delta_a
        self.weight += change


def prepare(model, args):
    """Prepares the model. Returns the functions to call at the start of a micro-batch and at the end of a step."""
    if args.way == "frozen":
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return model, lambda shard: None, lambda step: None
    if args.way == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=args.rank, lora_alpha=args.rank, lora_dropout=0.0, target_modules=list(ADAPTED))
        model = get_peft_model(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)

        def finish(step):
            optimizer.step()
            optimizer.zero_grad()

        return model, lambda shard: None, finish
    layers = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ADAPTED:
                layers.append(Published(child.weight.data, args.rank, args.shards))
                setattr(module, name, layers[-1])

    def select(shard):
        for layer in layers:
            layer.shard = shard

    def finish(step):
        for layer in layers:
            layer.update(step, args.lr)

    return model, select, finish


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("way", choices=["frozen", "lora", "published"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequences", required=True, help="JSON lines with ids and prompt_length")
    for name, default in [("shards", 2), ("rank", 16), ("batch", 1), ("steps", 6), ("threads", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    model.requires_grad_(False)
    start = time.perf_counter()
    model, select, finish = prepare(model, args)
    preparation = time.perf_counter() - start

    rows = iter([json.loads(line) for line in open(args.sequences)])
    rates, losses = [], []
    for step in range(1, args.steps + 1):
        start, total, tokens = time.perf_counter(), 0.0, 0
        # Shard k takes records k, k + K, ... of a step.
        records = [next(rows) for _ in range(args.shards * args.batch)]
        for shard in range(args.shards):
            own = records[shard :: args.shards]
            ids = torch.tensor([record["ids"] for record in own])
            labels = ids.clone()
            for row, record in enumerate(own):
                labels[row, : record["prompt_length"]] = -100
            select(shard)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            total += float(loss.detach())
            tokens += ids.numel()
        finish(step)
        rates.append(tokens / (time.perf_counter() - start))
        losses.append(total / args.shards)
    print(json.dumps({
        "tokens_per_s": statistics.median(rates[1:]),
        "preparation_s": preparation,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }))


if __name__ == "__main__":
    main()
