"""Model families and hosts: where other people's code keeps its parts."""
