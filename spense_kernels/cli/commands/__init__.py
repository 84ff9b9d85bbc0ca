# SPDX-License-Identifier: Apache-2.0
"""The commands by name, in the order of the help page."""

from spense_kernels.cli.commands.demo import demo
from spense_kernels.cli.commands.finetune import finetune
from spense_kernels.cli.commands.look import env, inspect, verify
from spense_kernels.cli.commands.prune import prune
from spense_kernels.cli.commands.run import evaluate, generate

ALL = {
    "demo": demo,
    "prune": prune,
    "finetune": finetune,
    "eval": evaluate,
    "generate": generate,
    "inspect": inspect,
    "verify": verify,
    "env": env,
}
