# The original's scripts/finetune.sh, several tasks at once. For example: sh examples/finetune.sh --data_dir path/to/glue
mpoe train --model t5 --tasks rte,sst2,mrpc,stsb,qqp,mnli,qnli,cola --temperature 10 --split_validation_test --mpo_layers mlp --moe_type switch --num_experts 8 --shape paper --label_smoothing 0.1 --max_steps 20000 --output_dir runs/finetune "$@"
