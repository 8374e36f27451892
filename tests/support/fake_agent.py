"""Stands where the agent stands in a job, to test slurm/job.sbatch without training.

python fake_agent.py WHEN_ASKED [NODE CODE]
  WHEN_ASKED  exit code after SIGUSR2, which asks to save and stop; after SIGTERM alone it is 1, because Slurm or srun
              then ends the job for a reason of its own
  NODE CODE   what the agent of one node does when all have begun, or of `every` node at once: exit with a code, or
              `kill` itself
"""

import os
import signal
import sys
import time

import submitit

asked: list[int] = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))

os.environ["SUBMITIT_EXECUTOR"] = "slurm"  # submitit does not see it by itself
environment = submitit.JobEnvironment()
node = environment.node
print(
    f"attempt={os.environ.get('SLURM_RESTART_COUNT', 0)} node={node}/{environment.num_nodes}",
    f"tasks={environment.num_tasks} hosts={','.join(environment.hostnames)}",
    f"cpus={os.environ['SLURM_CPUS_PER_TASK']} gpus={os.environ.get('CUDA_VISIBLE_DEVICES')}",
    flush=True,
)
if sys.argv[2:] and sys.argv[2] in (str(node), "every"):
    code = sys.argv[3]
    time.sleep(0 if sys.argv[2] == "every" else 1.5)  # a Python that still begins dies of srun's SIGTERM: 143
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(code))
end = time.monotonic() + 100
while not asked and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.2)  # saves; meanwhile srun's SIGTERM follows the first agent's exit
print(" ".join(signal.Signals(number).name for number in asked), flush=True)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # Python takes its handlers away before it ends, but leaves this
sys.exit(int(sys.argv[1]) if signal.SIGUSR2 in asked else 1)
