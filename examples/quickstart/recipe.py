"""The learning recipe of the demo: plain settings, and the measurements they were chosen by.

In: nothing. Out: constants. Success in percent on 100 held-out tasks, greedy, `A/B/C/anchor`, one
seed = another world (code books, tasks, initialisation); simulated with plain torch: LoRA r 8,
alpha 16 on all linear layers, fresh in every round on top of the release; A and B merged by the
exact product mean, cut to rank 32; `own+anchors` is one batch; `first+next` are own examples before
the first and before each further round. Before: A to D 0, anchor 98.

| steps, lr, decay, own+anchors, first+next | seed | R2 | R3 | R4 | |---|---|---|---|---| | 50,
5e-3, 0.7, 12+8, 300+60 | 0 | 42/19/33/93 | 77/52/61/98 | 82/68/73/97 | | | 1 | 37/35/25/96 |
48/50/48/96 | 52/59/57/97 | | the same, server step 1.5 | 0 | | 79/70/76/97 | 82/75/76/98 | | | 1 |
| 75/65/74/96 | 76/86/83/96 | | the same, decay 0.9 | 0 | | 81/62/76/98 | 98/95/95/98 | | | 1 | |
64/56/64/97 | 84/85/79/97 | | 50, 1e-2, 0.7, 12+8, 300+60 | 0 | | 88/81/92/98 | 100/95/94/98 | | | 1
| | 68/96/77/98 | 95/99/98/98 | | the same, server step 1.5 | 0 | 77/46/65/97 | 86/84/94/98 |
89/78/90/97 | | | 1 | 69/50/60/97 | 60/99/72/96 | 84/98/90/97 | | 50, 1.5e-2, 0.7, 12+8, 300+60 | 0
| 76/42/66/98 | 75/81/84/97 | 86/83/96/97 | | | 1 | 68/63/65/98 | 62/88/75/97 | 97/83/92/98 | | 50,
1e-2, 0.7, 16+4, 300+100 | 0 | | 84/77/90/98 | 98/98/100/97 | | | 1 | | 80/77/85/97 | 88/97/96/97 |
| 80, 1e-2, 0.7, 12+8, 300+100 | 0 | 95/81/89/98 | 99/100/97/98 | | | | 1 | 68/75/71/98 |
77/98/81/98 | | | 80, 1e-2, 0.7, 16+4, 500+100 | 0 | 70/67/72/98 | 90/99/90/98 | | | | 1 |
68/83/75/97 | 97/97/98/98 | | | 80, 1e-2, 0.7, 16+4, 400+100 | 0 | 91/92/91/98 | 100/97/97/98 | | |
| 1 | 79/72/75/98 | 98/98/99/98 | 98/98/99/98 | | | 2 | 96/86/83/97 | 84/99/88/97 | 98/86/87/98 | |
**80, 1e-2, 0.7, 16+8, 400+100** (this recipe, but for two additions) | 1 | 78/89/80/98 |
97/99/99/98 | | | | 2 | 84/84/73/98 | 83/100/82/99 | |

Two things were added after runs of the whole demo: with a decay of 0.7 one of five stuck (seed 0, A
75 and B 83 after seven releases). Every failure there was one of two pairs of codes taken for each
other, and an A/B mean that no longer moved: the late increments were small, and the truncation to
rank 32 cut away 3 to 8 % of every sum. The same rounds again, now with the node's own training code
and central's merge (150 held-out tasks, 16+8, 400+100; two initialisations a seed; `hard`: own
examples of a batch that correct the start release's own answers):

| decay, hard, R | seed | R2 | R3 | R4 | R5 |
|---|---|---|---|---|---|
| 0.7, 0, 32 | 0 | 76/95/76/97 | 85/99/86/99 | 85/99/88/99 | 87/99/86/97 |
| 0.7, 0, 64 | 0 | 76/95/76/97 | 85/99/87/99 | 85/99/89/99 | 99/100/98/98 |
| 0.85, 0, 32 | 0 | 86/97/91/98 | 97/99/98/99 | 97/99/100/98 | 98/99/99/99 |
| | 1 | 67/76/60/100 | 87/99/88/100 | 100/99/99/100 | 100/99/99/100 |
| 0.85, 0, 64 | 2 | 97/88/91/97 | 99/89/93/97 | 65/97/77/99 | 99/89/94/99 |
| | 2 | 83/85/79/97 | 96/99/91/97 | 98/99/98/99 | 98/98/98/99 |
| 0.8, 6, 32 | 1 | 69/93/70/99 | 99/86/91/99 | 75/99/81/99 | 99/99/97/99 |
| 0.8, 2, 64 | 0 | 87/91/88/97 | 97/99/95/97 | 97/99/96/96 | 98/99/99/97 |
| | 0 | 98/83/89/98 | 95/99/96/98 | 98/99/98/97 | 99/99/98/99 |
| | 1 | 71/85/66/99 | 99/98/97/99 | 99/99/99/100 | 99/99/99/99 |
| | 1 | 59/91/66/100 | 98/99/92/100 | 99/96/97/100 | 99/99/98/100 |
| | 2 | 79/89/83/98 | 93/89/91/97 | 93/98/95/97 | 97/99/99/98 |
| | 2 | 74/91/77/98 | 99/88/93/99 | 80/99/91/99 | 97/89/93/99 |

Hence a decay of 0.8, and two. Six, when few failures are left, repeat these few so often that A and
B swing. The rank stays 32: with a decay of 0.8 or more, 64 changed at most three points at R3 and
R4, and it makes answers a third dearer.

D alone in its cohort, D/anchor after rounds 1 and 2, seeds 0, 1, 2: four anchors a batch 98/93
85/90 95/89, then 98/94 100/98 95/98; eight anchors (seeds 1, 2) 86/97 95/95, then 92/97 (seed 1).
Hence eight: without averaging, four let the base skill fall by nine points in the first round.

With 16 own examples a batch D stuck in one whole run (seed 1: 87 after seven releases): two of its
eight verbs were taken for each other, all of one kind in one release and all of the other in the
next. In the node's own training code, D/anchor after R1 to R4 (150 tasks, seed 1, eight anchors a
batch):

| own a batch, hard, steps | initialisation | R1 | R2 | R3 | R4 |
|---|---|---|---|---|---|
| 16, 2, 80 | 1 | 89/95 | 89/97 | 99/95 | 99/97 |
| | 2 | 87/95 | 86/96 | 89/97 | 86/96 |
| | 3 | 87/97 | 89/97 | 89/100 | 100/99 |
| 16, 0, 80 | 2 | 87/95 | 89/97 | 89/96 | 89/95 |
| 8, 0, 80, no decay | 2 | 90/97 | 89/95 | 87/96 | 89/97 |
| | 5 | 86/96 | 87/97 | 87/97 | 85/97 |
| 16, 2, 160 | 2 | 90/97 | 87/97 | 100/99 | 100/99 |
| | 5 | 89/97 | 99/96 | 100/97 | 100/98 |
| **32, 2, 80** | 2 | 89/95 | 88/97 | 99/97 | 100/97 |
| | 5 | 89/95 | 99/95 | 100/97 | 100/97 |

Rates of 3e-3 and 1.5e-2 and a rank of 16 did not help. A and B gained nothing from 32 (seeds 0 and
2: R4 98/99/98/98 and 81/99/91/99, with 16 98/99/97/97 and 97/98/98/99), so only a node that is
alone has it.

A server step above 1 and rates above 1e-2 swing between A and B; more steps and more own examples
help most. Gaps of 12-17 points between A and B remain (seed 2), so the driver goes on until a wave
shows its targets, and does not stop after a fixed number of rounds. A round of 80 steps takes 6-8 s
of one busy core. Rows with empty cells were not run that far.
"""

from __future__ import annotations

from collections.abc import Mapping

LEARNING: Mapping[str, str] = {
    "EDGE_LEARNING__RANK": "8",
    "EDGE_LEARNING__ALPHA": "16",
    "EDGE_LEARNING__STEPS": "80",
    "EDGE_LEARNING__BATCH_OWN": "16",
    "EDGE_LEARNING__BATCH_HARD": "2",
    "EDGE_LEARNING__BATCH_ANCHOR": "8",
    "EDGE_LEARNING__ANCHOR_POOL": "1000",
    "EDGE_LEARNING__LEARNING_RATE": "0.01",
    "EDGE_LEARNING__ROUND_DECAY": "0.8",
}
"""A round at a node that shares its cohort."""

LEARNING_ALONE: Mapping[str, str] = {**LEARNING, "EDGE_LEARNING__BATCH_OWN": "32"}
"""A round at a node that is alone in its cohort.

Nothing averages the noise of its steps away, so a larger batch does.
"""

MERGE: Mapping[str, str] = {
    "CENTRAL_MERGE__STRATEGY": "product-mean",
    "CENTRAL_MERGE__RANK": "32",
    "CENTRAL_MERGE__SERVER_STEP": "1.0",
}
"""A merge at central."""

FIRST_WAVE = 400
"""Tasks with feedback at a node before its first round."""

NEXT_WAVE = 100
"""Tasks with feedback on each further release."""
