#!/bin/bash
# A job of Open MPI that outlives its time limit: before Slurm ends it, it is checkpointed and put back into the queue, and
# when it starts again it goes on from the newest complete image. Copy it, and change what is marked with <--.
#
#SBATCH --nodes=2                    # <--
#SBATCH --ntasks-per-node=2          # <--
#SBATCH --time=04:00:00              # <-- of one turn, not of the whole job
#
# SIGTERM so many seconds before the limit: long enough to write the memory of all ranks. Slurm may send it a minute early.
#SBATCH --signal=B:TERM@300          # <--
#SBATCH --requeue
#SBATCH --open-mode=append

# A folder that all nodes share, one for each job: it holds the images.
images=$SLURM_SUBMIT_DIR/images-$SLURM_JOB_ID

# mpirun reaches the other nodes by srun, or by what REVERBS_RSH names. Its list of nodes is given: of itself it would have
# Slurm start its daemons.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$SLURM_NTASKS_PER_NODE/" | paste -sd,)

# `exec`, so that the signal goes to reverbs: a shell would wait for its command first.
exec reverbs run --images "$images" --requeue -- \
	mpirun --host "$hosts" ./my-program # <--
