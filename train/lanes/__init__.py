"""Run K members of a population as the lanes of one training program, vmapped or sequential."""
