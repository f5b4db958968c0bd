"""The learning recipe of the demo: plain settings, and the measurements they were chosen by.

In: nothing. Out: constants. Success in percent on 100 held-out tasks, greedy, `A/B/C/anchor`, one seed = another world
(code books, tasks, initialisation); simulated with plain torch: LoRA r 8, alpha 16 on all linear layers, fresh in every
round on top of the release; A and B merged by the exact product mean, cut to rank 32; `own+anchors` is one batch;
`first+next` are own examples before the first and before each further round. Before: A to D 0, anchor 98.

| steps, lr, decay, own+anchors, first+next | seed | R2 | R3 | R4 |
|---|---|---|---|---|
| 50, 5e-3, 0.7, 12+8, 300+60 | 0 | 42/19/33/93 | 77/52/61/98 | 82/68/73/97 |
| | 1 | 37/35/25/96 | 48/50/48/96 | 52/59/57/97 |
| the same, server step 1.5 | 0 | | 79/70/76/97 | 82/75/76/98 |
| | 1 | | 75/65/74/96 | 76/86/83/96 |
| the same, decay 0.9 | 0 | | 81/62/76/98 | 98/95/95/98 |
| | 1 | | 64/56/64/97 | 84/85/79/97 |
| 50, 1e-2, 0.7, 12+8, 300+60 | 0 | | 88/81/92/98 | 100/95/94/98 |
| | 1 | | 68/96/77/98 | 95/99/98/98 |
| the same, server step 1.5 | 0 | 77/46/65/97 | 86/84/94/98 | 89/78/90/97 |
| | 1 | 69/50/60/97 | 60/99/72/96 | 84/98/90/97 |
| 50, 1.5e-2, 0.7, 12+8, 300+60 | 0 | 76/42/66/98 | 75/81/84/97 | 86/83/96/97 |
| | 1 | 68/63/65/98 | 62/88/75/97 | 97/83/92/98 |
| 50, 1e-2, 0.7, 16+4, 300+100 | 0 | | 84/77/90/98 | 98/98/100/97 |
| | 1 | | 80/77/85/97 | 88/97/96/97 |
| 80, 1e-2, 0.7, 12+8, 300+100 | 0 | 95/81/89/98 | 99/100/97/98 | |
| | 1 | 68/75/71/98 | 77/98/81/98 | |
| 80, 1e-2, 0.7, 16+4, 500+100 | 0 | 70/67/72/98 | 90/99/90/98 | |
| | 1 | 68/83/75/97 | 97/97/98/98 | |
| 80, 1e-2, 0.7, 16+4, 400+100 | 0 | 91/92/91/98 | 100/97/97/98 | |
| | 1 | 79/72/75/98 | 98/98/99/98 | 98/98/99/98 |
| | 2 | 96/86/83/97 | 84/99/88/97 | 98/86/87/98 |
| **80, 1e-2, 0.7, 16+8, 400+100** (this recipe, but for the two additions) | 1 | 78/89/80/98 | 97/99/99/98 | |
| | 2 | 84/84/73/98 | 83/100/82/99 | |

Two things were added after runs of the whole demo, which the table does not have. With a decay of 0.7 one of five runs
stuck (seed 0, A 75 and B 83 after seven releases: late rounds were too gentle to correct the last words). With 0.85
this simulation gave 92/87/89/98 and 98/100/100/98 at R4 (seeds 3, 4); the decay is 0.8. And six of the sixteen own
examples are corrections of the start release's own answers. The demo since, seed 0, A/B/C/D: 95/99/95/99.

D alone in its cohort, D/anchor after rounds 1 and 2, seeds 0, 1, 2: four anchors a batch 98/93 85/90 95/89, then 98/94
100/98 95/98; eight anchors (seeds 1, 2) 86/97 95/95, then 92/97 (seed 1). Hence eight: without averaging, four let
the base skill fall by nine points in the first round.

A server step above 1 and rates above 1e-2 swing between A and B; more steps and more own examples help most. Gaps of
12-17 points between A and B remain (seed 2), so the driver goes on until a wave shows its targets, and does
not stop after a fixed number of rounds. A round of 80 steps takes 6-8 s of one busy core. Rows with empty cells were
not run that far.
"""

from __future__ import annotations

from collections.abc import Mapping

LEARNING: Mapping[str, str] = {
    "EDGE_LEARNING__RANK": "8",
    "EDGE_LEARNING__ALPHA": "16",
    "EDGE_LEARNING__STEPS": "80",
    "EDGE_LEARNING__BATCH_OWN": "16",
    "EDGE_LEARNING__BATCH_HARD": "6",
    "EDGE_LEARNING__BATCH_ANCHOR": "8",
    "EDGE_LEARNING__ANCHOR_POOL": "1000",
    "EDGE_LEARNING__LEARNING_RATE": "0.01",
    "EDGE_LEARNING__ROUND_DECAY": "0.8",
}
"""A round at a node."""

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
