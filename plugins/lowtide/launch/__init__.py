"""Starts jobs on one machine or under Slurm, and decides whether they start again.

The shell scripts in ``launch/`` of the repository stay thin; what needs thought is here, in the
order of a job: `plan` (who runs where), `preflight` (can they), `node` (become torchrun or a rank),
`attempts` (again or not), `status`. Nothing here imports torch: a login node may lack it.
"""
