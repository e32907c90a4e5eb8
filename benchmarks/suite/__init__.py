"""Everything that needs a GPU, in parts with a time limit; `../gpu_suite.sh` is the command.

`__main__` runs the `parts` one after another, each by `process` within its seconds; `outbox` limits their results to a
few small files. The part bench is `bench`: a `schedule` of steps, each done by a worker of the `pool`, which is killed
if a contender hangs. `row` is the work of a worker, `launches` records which kernels it launched, `breakdown` measures
where the time goes.
"""
