"""Cost of planning one pass, against the host's own shuffle of as many samples.

    python benchmarks/planning.py [--samples 10000000] [--repeats 5]

The host's samplers draw ``torch.randperm(n).tolist()`` for each pass. Runs alternate; medians are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from infobatch_mm.policies import InfoBatchPolicy


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="cost of planning one pass")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    # a long tail, as losses have it
    scores = torch.rand(args.samples, generator=generator).pow(3)
    seen = torch.ones(args.samples, dtype=torch.bool)
    policy = InfoBatchPolicy()

    ours, host = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        plan = policy.draw(scores, seen, generator, multiple_of=256)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.randperm(args.samples, generator=generator).tolist()
        host.append(time.perf_counter() - start)
    assert plan is not None
    ratio = statistics.median(a / b for a, b in zip(ours, host, strict=True))
    print(
        f"{args.samples:,} samples, {len(plan):,} visits: planned in {statistics.median(ours):.2f} s, the host's "
        f"shuffle takes {statistics.median(host):.2f} s (median of paired ratios {ratio:.2f}, "
        f"{torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
