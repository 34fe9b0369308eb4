"""What others run a spec with: a Ray Serve config, a KubeRay manifest."""
