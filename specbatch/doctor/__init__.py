"""``specbatch doctor``: checks whether a run will work here, and how fast.

- `finding`: the result of a check;
- `site`: checks of a node that take less than a second, with which every attempt begins (`quick`), and others;
- `gpu`: whether torch can use the GPUs;
- `network`, `store`: whether nodes reach each other, and exchange objects of the store;
- `engine`: SGLang and what it captures;
- `rank`, `attention`: trainer ranks, their kernels, a step and a snapshot;
- `task`: all checks of one task of a component;
- `here`, `job`: such tasks on this machine, or in a Slurm job with the run's own layout;
- `outcome`: the table, the rates, and which profile has passed.
"""
