"""Draft algorithms, one module each.

A new algorithm provides

- a `specbatch.capture.CaptureContract`: which layers' outputs and which rows it reads of the target;
- a ``torch.nn.Module`` whose ``forward(pack, weights)`` takes a `pack.PackTensors` and gives the weighted
  losses and numbers of right proposals of its unrolled steps, whose parameters have the names that engines
  load, whose ``initialize`` makes them from a seed, and whose ``calibrate`` fits them to the scale of the
  target's states before the first step;
- how many columns enter the loss of each step, from a sample's mask alone (`pack.supervised_counts`), so
  that every rank knows the denominators of a step beforehand.

Plan, dispatcher, store, engines, dataloader and trainer know nothing else about drafts.
"""
