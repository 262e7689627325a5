"""Several processes together: what they exchange, and that nobody waits for one that failed."""

import textwrap
import time

import pytest
import torch

from quantize.calibration.statistics import Rows
from quantize.errors import UsageError
from quantize.pipeline.distributed import SingleProcess, device_of_rank, merged


@pytest.fixture
def together(tmp_path, torchrun):
    """Run lines of Python in some processes, each as one of `ranks`."""

    def run(body, count=2):
        script = tmp_path / "script.py"
        lines = "import sys, torch\nfrom quantize.pipeline.distributed import init_distributed, merged\n"
        lines += "with init_distributed() as (ranks, _):\n"
        script.write_text(lines + textwrap.indent(textwrap.dedent(body), "    "))
        return torchrun(script, count=count)

    return run


@pytest.mark.slow
def test_sums_run_through_the_ranks_in_the_order_of_one_process(together):
    """In float32 (1 + 1e8 + 1) - 1e8 is 0 in order, and 1 + 1 in another: any other order shows."""
    done = together(
        """
        lefts = torch.tensor([1.0, 1e8, 1.0, -1e8, 1.0, 0.5])
        totals = [torch.zeros(700, 700), torch.zeros(700, 700)]
        one = torch.ones(1, 700)
        ranks.sum_products(totals, [([left * one, -left * one], one) for left in ranks.shard(lefts)])
        found = [total.unique().tolist() for total in totals]
        gathered = ranks.gather({"from": ranks.rank, "x": torch.arange(ranks.rank + 1)})
        found += [(given["from"], given["x"].tolist()) for given in gathered]
        sys.stdout.write(f"{ranks.rank} {found}\\n")
        """,
        count=3,
    )
    total = torch.zeros(())
    for part in torch.tensor([1.0, 1e8, 1.0, -1e8, 1.0, 0.5]):
        total += part
    assert done.returncode == 0, done.stderr
    expected = [[total.item()], [-total.item()], (0, [0]), (1, [0, 1]), (2, [0, 1, 2])]
    assert sorted(done.stdout.splitlines()) == [f"{rank} {expected}" for rank in range(3)]


@pytest.mark.slow
def test_a_rank_forecasts_from_what_those_before_it_have_summed(together):
    """Sums in bfloat16, of which each batch but the first ones is forecast."""
    body = """
        from quantize.calibration import gram_sums
        x = torch.randn(9, 200, 40, generator=torch.Generator().manual_seed(0)) + 1
        given = [gram_sums.gram_factors(part, None, torch.bfloat16) for part in ranks.shard(x)]
        totals = [torch.zeros(40, 40)]
        ranks.sum_products(totals, given)
        sys.stdout.write(f"{totals[0].flatten().tolist()}\\n")
        """
    done, alone = together(body, count=3), together(body, count=1)
    assert done.returncode == alone.returncode == 0, done.stderr + alone.stderr
    assert set(done.stdout.splitlines()) == set(alone.stdout.splitlines())


@pytest.mark.slow
def test_a_failure_reaches_the_others_at_their_next_exchange(together):
    start = time.monotonic()
    done = together(
        """
        try:
            if ranks.rank == 1:
                raise ValueError("no data")
            ranks.gather({"x": torch.zeros(1)})
        except Exception as error:
            sys.stdout.write(f"{ranks.rank} {error}\\n")
            raise
        """
    )
    assert done.returncode != 0
    assert sorted(done.stdout.splitlines()) == [
        "0 rank 1 of 2 failed, so this one stops too; see its message",
        "1 no data",
    ]
    assert time.monotonic() - start < 300  # what nobody answers is given up after 30 minutes


@pytest.mark.slow
def test_nobody_waits_for_a_rank_that_was_killed(together):
    start = time.monotonic()
    done = together(
        """
        import os, signal
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.sum_products([torch.zeros(4, 4)], [])
        """
    )
    assert done.returncode != 0
    assert time.monotonic() - start < 300


@pytest.mark.slow
def test_merged_statistics_are_those_of_all_data(together):
    X = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    whole = Rows()
    whole.update(X)
    done = together(
        """
        from quantize.calibration.statistics import Rows
        X = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
        mine = Rows()
        mine.update(X[1000 * ranks.rank :][: 1000 + 1000 * ranks.rank])
        found = merged({"w": mine} if len(mine.value) else {}, Rows, ranks)["w"]
        sys.stdout.write(f"{ranks.rank} {float(found.value.sum())} {found.absmax.value.tolist()}\\n")
        """
    )
    assert done.returncode == 0, done.stderr
    expected = f"{float(whole.value.sum())} {whole.absmax.value.tolist()}"
    assert sorted(done.stdout.splitlines()) == [f"0 {expected}", f"1 {expected}"]


def test_one_process_shares_with_nobody():
    ranks = SingleProcess()
    assert ranks.shard([1, 2, 3]) == [1, 2, 3]
    assert merged({"w": Rows()}, Rows, ranks) == {"w": Rows()}


def test_each_rank_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_rank(torch.device("cuda"), 1, 2) == torch.device("cuda:1")
    assert device_of_rank(torch.device("cpu"), 1, 3) == torch.device("cpu")
    with pytest.raises(UsageError, match="--device cuda: 3 ranks need a card each, and there are 2; start fewer"):
        device_of_rank(torch.device("cuda"), 1, 3)
    with pytest.raises(UsageError, match="--device cuda:1: 2 ranks need a card each; give --device cuda"):
        device_of_rank(torch.device("cuda:1"), 1, 2)
