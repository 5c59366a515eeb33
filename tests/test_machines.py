"""configs/machines: what each file starts, with stand-ins for Slurm and the launcher."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from cluster.__main__ import command_line

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ROOT / "configs" / "machines"


@pytest.fixture
def shell(tmp_path):
    """A function that runs a script with some commands replaced: {name: body of a shell script}."""

    def run(script, *arguments, commands, **variables):
        for name, body in commands.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        command = ["bash", *map(str, script), *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


PRINT = """printf '%s\\n' "$@" """  # one argument per line


def check_launch(arguments, machine):
    """Arguments of `accelerate launch` on machine number `machine` of ten with eight GPUs; returns the script's."""
    assert arguments[0] == "launch"
    args = launch_command_parser().parse_args(arguments[1:])
    assert (args.num_machines, args.num_processes, args.machine_rank) == (10, 80, machine)
    assert (args.main_process_ip, args.config_file) == ("node1", "configs/fsdp2.yaml") and args.main_process_port
    assert args.training_script == "train_sft.py" and (ROOT / args.config_file).exists()
    return args.training_script_args


def test_slurm_starts_a_launcher_per_node(shell):
    srun = 'shift; SLURM_NODEID=3 exec "$@"'  # as on the fourth node
    commands = {"scontrol": 'printf "node1\\nnode2\\n"', "srun": srun, "accelerate": PRINT}
    variables = {"SLURM_JOB_NODELIST": "node[1-10]", "SLURM_NNODES": "10", "SLURM_GPUS_ON_NODE": "8"}
    flags = ["configs/stage1.yaml", "--resume_from_checkpoint", "last"]
    printed = shell([MACHINES / "train.sbatch"], *flags, commands=commands, SLURM_JOB_ID="123456", **variables)
    assert check_launch(printed.splitlines(), 3) == ["--config", *flags]


def test_skypilot_starts_a_launcher_per_node(shell):
    job = yaml.safe_load((MACHINES / "skypilot.yaml").read_text())
    variables = {"SKYPILOT_NUM_NODES": str(job["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8", **job["envs"]}
    variables |= {"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NODE_IPS": "node1\nnode2"}
    assert job["resources"]["accelerators"].endswith(":8")
    printed = shell(["-c", job["run"]], commands={"accelerate": PRINT}, **variables)
    assert check_launch(printed.splitlines(), 3) == ["--config", "configs/stage1.yaml"]


def test_a_job_of_an_array_has_its_share_however_many_are_submitted(shell):
    arguments = ["waymo", "--raw", "/data/way mo", "--out", "/data/bench"]
    variables = {"SLURM_ARRAY_TASK_ID": "17", "SLURM_CPUS_PER_TASK": "16", "SLURM_ARRAY_TASK_COUNT": "1"}
    printed = shell([MACHINES / "build.sbatch"], *arguments, commands={"python": PRINT}, **variables)
    share = ["--num-proc", "16", "--shard-range", "17/64"]
    assert printed.splitlines() == ["-m", "bench", "build", *arguments, *share]
    assert "#SBATCH --array=0-63\n" in (MACHINES / "build.sbatch").read_text()


def test_rayjob_runs_a_command_that_exists():
    job = yaml.safe_load((MACHINES / "rayjob.yaml").read_text())
    python, option, package, *arguments = shlex.split(job["spec"]["entrypoint"])
    args = command_line().parse_args(arguments)
    assert (python, option, package, args.ray, args.device) == ("python", "-m", "cluster", "auto", "cuda")
    spec = job["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = workers["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    cpus = workers["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert args.actors == gpus and args.actors + args.readers * 0.25 <= cpus
    pinned = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("ray = ")]
    assert f"=={spec['rayVersion']}" in pinned[0]
