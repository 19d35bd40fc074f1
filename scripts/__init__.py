"""The verbs of `dipole`: the only place where policy, envs and conf meet. One file, one verb, one `main`."""
