"""Optimize the default model and look at what was found."""

import joulesmith

result = joulesmith.optimize("smollm2", keep=0.99)
print(result.verdict)
for run in result.runs:
    quality = f"keeps {run.quality.kept:.2%}" if run.quality else "not judged"
    joules = run.workload.joules
    print(f"{run.name:24} {'unknown' if joules is None else f'{joules:.4f}'} J/token, {quality}")
