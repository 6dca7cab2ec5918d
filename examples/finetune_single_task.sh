# The original's scripts/finetune_single_task.sh. For example: sh examples/finetune_single_task.sh --tasks cola
mpoe train --model t5 --tasks rte --split_validation_test --mpo_layers mlp --moe_type switch --num_experts 8 --shape paper --max_steps 5000 --output_dir runs/finetune_single_task "$@"
