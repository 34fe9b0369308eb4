"""From a model, GPUs, a workload and SLOs to a deployment that holds: `deploy.planner.search.plan`."""
