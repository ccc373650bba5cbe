"""``ppsd-lab baselines``: the pipeline beside other decoders."""

from __future__ import annotations

from contextlib import ExitStack

from ppsd.lab.cli.prompts import (
    GREEDY,
    Pipeline,
    WorkOptions,
    groups_of,
    measured,
    planned_pipeline,
    show,
)


def baselines(config: Pipeline, work: WorkOptions) -> None:
    """Compare the pipeline with other decoders on the same cores, greedily and in one dtype."""
    tasks = work.tasks()
    from ppsd.lab.baselines import BaselineBench, OutsiderProcess, outsiders
    from ppsd.lab.rivals.rivals import heads_for
    from ppsd.lab.tasks import variants
    from ppsd.types import SamplingParams

    chosen = variants(())
    with planned_pipeline(config, chosen) as llm, ExitStack() as stack:
        path = llm.layout.files.path
        dtype = str(llm.layout.dtype).removeprefix("torch.")
        others = []
        exit_layer, heads = llm.layout.bounds[1], bool(heads_for(llm.layout.identity))
        for outsider in outsiders(exit_layer, llm.layout.files.is_gguf, heads):
            shares = llm.layout.cores[: 1 if outsider.one_stage else None]
            cores = [core for share in shares for core in share]
            threads = llm.layout.threads * len(shares)
            others.append(OutsiderProcess(outsider, str(path), dtype, threads, cores))
            stack.callback(others[-1].close)
        params = SamplingParams(max_tokens=work.max_tokens)
        bench = BaselineBench(llm, chosen, others, tasks, params)
        names = [v.name for v in chosen] + [other.name for other in others]
        results = measured("baselines", llm, work, names, tasks, [GREEDY], bench.measure)
        show(llm, work, results, groups_of(tasks, [GREEDY]))
