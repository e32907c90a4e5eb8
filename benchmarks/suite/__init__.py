"""All that needs a GPU, in parts that fit its minutes; `../gpu_suite.sh` is the command.

`__main__` runs the `parts` one after another, each by `process` within its seconds; `outbox` keeps what they leave to a
few small files. The part bench is `bench`: a `schedule` of steps, each done by a worker of the `pool`, which is killed
with the contender that hangs. `row` is what a worker does, `launches` tells which kernels that took, `breakdown` where
the time goes.
"""
