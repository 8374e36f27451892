"""Stands where the agent stands in a job, to test the job's script without training: it obeys the same contract.

python agent_stand_in.py WHEN_ASKED [NODE CODE]    exit code when SIGUSR2 asks to stop; what one node does at once

SIGUSR2 asks to stop and save. SIGTERM alone says that Slurm ends the job for a reason of its own.
"""

import os
import signal
import sys
import time

import submitit

asked: list[int] = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))

environment = submitit.JobEnvironment()
node = environment.node
print(
    f"attempt={os.environ.get('SLURM_RESTART_COUNT', 0)} node={node}/{environment.num_nodes}",
    f"tasks={environment.num_tasks} hosts={','.join(environment.hostnames)}",
    f"cpus={os.environ['SLURM_CPUS_PER_TASK']} gpus={os.environ.get('CUDA_VISIBLE_DEVICES')}",
    flush=True,
)
if sys.argv[2:] and node == int(sys.argv[2]):
    code = sys.argv[3]
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(code))
end = time.monotonic() + 100
while not asked and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.2)  # saves; meanwhile srun's SIGTERM follows the first agent's exit
print(" ".join(signal.Signals(number).name for number in asked), flush=True)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # Python's own end would take the handlers away, and a signal would kill
sys.exit(int(sys.argv[1]) if signal.SIGUSR2 in asked else 1)
