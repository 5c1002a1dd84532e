# Pre-training a Llama of 1.04B parameters on 20.2B tokens, twenty for each parameter, on the eight GPUs of one machine: a
# mixture that becomes better towards the end, batches that double, and a rate that falls linearly over the last 3B tokens.
#   bash experiments/configs/pretrain_8gpu.sh
#
# What it costs, by the accounting:
#   isoflop model show llama3.2-1b --seq-len 4096 --mesh fsdp=8 \
#     --set max_seq_len=4096 vocab_size=32768 eos_token_ids=2 rope_scaling=null
# 6.24e9 FLOPs a token (6N), 7.85e9 exact, so 1.26e20 (6ND) and 1.59e20 in all; 1.45 GiB of parameters and moments on each
# device, and half a GiB of gradients; activations come on top, which --microbatch auto fits into what is left, and the first
# line of the run says how much that is. A checkpoint: 11.6 GiB.
set -euo pipefail

test -d data/web || isoflop data prepare web.jsonl --out data/web --vocab-size 32768
test -d data/good || isoflop data prepare good.jsonl --out data/good --tokenizer data/web

isoflop train llama3.2-1b --data web=data/web good=data/good --out runs/1b \
  --phases experiments/configs/pretrain_8gpu_phases.json --batch-size 256 --seq-len 4096 --learning-rate 6e-4 \
  --mesh fsdp=8 --microbatch auto \
  --set max_seq_len=4096 rope_scaling=null remat=dots loss_chunks=8 spike_sigma=6 \
  --evaluate-every 1000 --checkpoint-seconds 900 --keep-every 5000

# For other programs: config.json, safetensors and the tokenizer.
isoflop model convert runs/1b exports/1b --dtype bfloat16
