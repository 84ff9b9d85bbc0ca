# SPDX-License-Identifier: Apache-2.0
"""Tokens drawn anew from the dense model's predictions, and a fine-tune on such windows."""

from __future__ import annotations

import pytest
import torch
from prune_models import make, student_of

from spense_kernels.finetune import FinetuneConfig, finetune, train
from spense_kernels.finetune.batches import Batches
from spense_kernels.finetune.resample import resampled
from spense_kernels.finetune.teacher import last_hidden

WINDOWS = torch.randint(0, 211, (5, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def teacher():
    return make("gemma3")


@torch.no_grad()
def test_draws_follow_the_model(teacher):
    """2000 evenly spread chances at one place find each token as often as it is probable."""
    count, place = 2000, 7
    ids = WINDOWS[:1].expand(count, -1).contiguous()
    hidden = last_hidden(teacher, WINDOWS[:1]).expand(count, -1, -1)
    places = torch.full((count, 1), place)
    chances = ((torch.arange(count) + 0.5) / count)[:, None]
    found = resampled(teacher, hidden, ids, places, chances)
    assert torch.equal(found[:, :place], ids[:, :place])
    assert torch.equal(found[:, place + 1 :], ids[:, place + 1 :])
    share = torch.bincount(found[:, place], minlength=211) / count
    expected = teacher(WINDOWS[:1]).logits[0, place - 1].softmax(dim=-1)
    torch.testing.assert_close(share, expected, rtol=0, atol=1.01 / count)


@torch.no_grad()
def test_every_chance_finds_a_token_of_the_vocabulary(teacher):
    places = torch.arange(1, 24).expand(5, -1)
    hidden = last_hidden(teacher, WINDOWS)
    for chance in (0.0, 1.0):
        chances = torch.full((5, 23), chance)
        found = resampled(teacher, hidden, WINDOWS, places, chances)
        assert torch.equal(found[:, 0], WINDOWS[:, 0])
        assert int(found.min()) >= 0
        assert int(found.max()) < 211


def test_places_of_draws():
    windows = torch.zeros(8, 41, dtype=torch.int64)
    batches = Batches(windows, FinetuneConfig(batch=64, resample=0.25))
    assert batches.changed
    places, chances = batches.draws(3)
    assert places.shape == chances.shape == (64, 10)
    assert set(places.flatten().tolist()) == set(range(1, 41))
    assert all(len(set(row)) == 10 for row in places.tolist())
    again = batches.draws(3)
    assert torch.equal(places, again[0])
    assert torch.equal(chances, again[1])
    assert not torch.equal(places, batches.draws(4)[0])


def test_a_fine_tune_on_windows_drawn_anew(teacher, monkeypatch):
    """Student and teacher see the same changed windows, in micro-batches too."""
    seen = {"student": [], "teacher": []}
    plain = last_hidden

    def watched(model, ids):
        seen["teacher" if model is teacher else "student"].append(ids.clone())
        return plain(model, ids)

    monkeypatch.setattr(train, "last_hidden", watched)
    config = FinetuneConfig(steps=40, batch=4, micro_batch=2, lr=1e-3, resample=0.2)
    report = finetune(student_of("gemma3"), teacher, WINDOWS, config)
    assert report.losses[-1] < 0.8 * report.losses[0]
    # The teacher runs twice: for the predictions to draw from, and for those to learn from.
    assert len(seen["teacher"]) == 2 * len(seen["student"]) == 160
    for i, ids in enumerate(seen["student"]):
        given, drawn = seen["teacher"][2 * i : 2 * i + 2]
        assert torch.equal(ids, drawn)
        changed = (given != drawn).sum(dim=1)
        assert 0 < int(changed.max()) <= 5  # a fifth of 23 tokens, some drawn as they were
