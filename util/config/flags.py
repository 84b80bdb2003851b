"""
Every flag, once, with all its facts: type, default, help, topic, kind, families, and how checkpoints and recipes treat it.

The parser, --help, the checks of values and families, the settled defaults, the comparison with a checkpoint and OUT/flags.json come
from this table (`util/config/declare.py` says what each fact means). Rules between several flags are in `util/config/rules.py`.
"""

import math
from argparse import Namespace

from util.bounds import float_range, int_range

from .declare import (
    ALWAYS,
    BY_NAMES,
    DATA,
    DETECTION,
    NETWORK,
    RUN,
    SWITCH,
    TEXT,
    TRAINING,
    UNLESS_CONDITIONAL,
    YES_NO,
    ByFamily,
    Flag,
    topic,
)
from .networks import VARIANTS, Decoder, Usual, has_pyramid

DETR, CONDITIONAL, DEFORMABLE, QUERIES = (
    ('detr',),
    ('conditional',),
    ('deformable',),
    ('conditional', 'deformable'),
)


def hybrid(a: Namespace) -> bool:
    return any(getattr(a, name, None) is not None for name in ('hybrid_k', 'hybrid_queries', 'hybrid_lambda'))


def implied(variant: Decoder) -> str:
    *others, last = (f'--{name}' for name in variant.implies)
    return f'{", ".join(others)} and {last}' if others else last


# --aug -> what it does with training images, with classes in `datasets.augmentations.AUGMENTATIONS`.
AUGMENTATIONS = {
    'detr': 'flip, scale and crop',
    'flip': 'flip only',
    'none': 'as at evaluation',
    'co_detr': "as detr by mmdetection's rules of resizing and its choice of objects, at evaluation too",
    'lsj': 'large-scale jitter in a square and, where objects have masks, copy-paste',
}
# Losses of boxes, functions of `models.training.losses.BOX_LOSSES`: their coefficients, and what they measure.
BOX_TERMS = {'bbox': (5, 'the L1 distance of boxes'), 'giou': (2, 'the generalized IoU of boxes')}
RANDOM_SCALES = ('detr', 'co_detr')  # those that read --train_scales and --train_max_size

MIXED_COEFFICIENTS = {
    'cls': 2.0,
    'bbox': 5.0,
    'giou': 2.0,
}  # of MS-DETR's second predictions and of its proposals


def coefficients_of(term: str) -> tuple[Flag, Flag]:
    """Return the flags of a loss for MS-DETR's second predictions and for the proposals of two stages."""
    mixed, own = MIXED_COEFFICIENTS.get(term, 0.0), f'{term}_loss_coef'
    usual = Usual(
        f'{mixed:g} with --use_ms_detr, else --{own}', lambda a: mixed if a.use_ms_detr else getattr(a, own)
    )
    return (
        Flag(
            f'o2m_{own}',
            float_range(),
            mixed,
            f'--{own} for the second predictions of --use_ms_detr',
            needs='use_ms_detr',
            hidden=True,
        ),
        Flag(f'enc_{own}', float_range(), usual, f'--{own} for the proposals of --two_stage', hidden=True),
    )


# fmt: off
FLAGS = {flag.name: flag for flag in (
    Flag('num_classes', int_range(1, 10**6), 91, 'class indices; the dataset has their number', kind=NETWORK, topic='model family', compared=False, adopted=False, launch=True, command=False),
    *topic('data', DATA)(
        Flag('dataset_file', ('coco', 'lvis', 'voc', 'yolo', 'shapes'), 'coco',
             'coco: any data in COCO form; lvis: LVIS v1; voc, yolo: folders of Pascal VOC and of YOLO; '
             'shapes: built-in images, drawn as they are needed', first=True),
        Flag('coco_path', TEXT, None, 'folder with annotations/instances_{train,val}2017.json and {train,val}2017/ or images/{train,val}2017/ (2017 may be missing); of voc with ImageSets/Main; of yolo with data.yaml, or that file', metavar='DIR', first=True),
        Flag('train_images', TEXT, None, 'folder of train images, instead of --coco_path', metavar='DIR'),
        Flag('train_ann', TEXT, None, 'file of train annotations, instead of --coco_path; or tar shards, which hold images too: shards.json of tools/make_shards.py, or its folder', metavar='FILE'),
        Flag('val_images', TEXT, None, 'folder of val images, instead of --coco_path', metavar='DIR'),
        Flag('val_ann', TEXT, None, 'file of val annotations, or tar shards, as --train_ann', metavar='FILE'),
        Flag('class_ids', ('auto', 'contiguous'), 'auto', "class indices of the model. auto: COCO's 91 ids for COCO, 0 to K-1 in order of id for other data; contiguous: 0 to K-1 for COCO too, 80 classes"),
        Flag('check_data', SWITCH, False, 'read and decode all data, report what looks wrong, draw some of it into --output_dir, then stop', launch=True),
        Flag('allow_outside', SWITCH, False, 'take images whose file_name leads out of the image folder (an absolute path, or ..); refused otherwise, because an annotation file of unknown origin could name any file', launch=True),
        Flag('allow_pipe', SWITCH, False, 'run the commands that stand for tar shards in shards.json ("pipe:COMMAND"); refused otherwise, because an index of unknown origin could run anything', launch=True),
        Flag('repeat_threshold', float_range(0, 1), 0.0, 'repeat training images of classes that are in less than this share of the images, the rarer the more often; usual for LVIS: 0.001', unset='0, no repetition', metavar='SHARE'),
        Flag('img_size', int_range(16, 10**5), Usual('1024 with --aug lsj, else 800', lambda a: 1024 if a.aug == 'lsj' else 800),
             'shorter side of an image at evaluation, pixels; the scales of training shrink and grow with it. With --aug lsj: side of its squares'),
        Flag('max_size', int_range(16, 10**5), None, 'longest side of an image, pixels', unset='1333, in proportion to --img_size'),
        Flag('train_scales', int_range(16, 10**5), None, f'shortest and longest short side of a training image with --aug {" or ".join(RANDOM_SCALES)}, pixels, in steps of 32', unset='480 800, in proportion to --img_size', nargs=2, metavar=('MIN', 'MAX')),
        Flag('train_max_size', int_range(16, 10**5), None, f'longest side of a training image with --aug {" or ".join(RANDOM_SCALES)}, pixels', unset='--max_size'),
        Flag('aug', tuple(AUGMENTATIONS), 'detr', f'augmentation of training images. {"; ".join(map(": ".join, AUGMENTATIONS.items()))}'),
        Flag('shapes_train', int_range(1, 10**9), 4000, 'number of built-in training images'),
        Flag('shapes_val', int_range(1, 10**9), 200, 'number of built-in validation images'),
        Flag('shapes_size', int_range(1, 10**9), 128, 'longer side of a built-in image, pixels', hidden=True),
    ),
    *topic('loading', DATA)(
        Flag('num_workers', int_range(0, 10**4), 2, 'loader workers per training process', launch=True),
        Flag('batches', ('random', 'aspect', 'size'), 'random', 'images of a training batch. aspect: all wider than high, or all not; '
             'size: of about the same size after scaling and cropping, on all processes: a quarter of the padding, and no process waits'),
        Flag('cache_mode', SWITCH, False, 'has no effect: the operating system keeps files that were read in free memory', launch=True, hidden=True),
        Flag('shard_buffer', int_range(1), 1000, 'images among which a loader worker shuffles tar shards; it holds their files in memory', hidden=True),
    ),
    *topic('model family (plain DETR when no flag of a variant is given)', NETWORK)(
        Flag('conditional', SWITCH, False, 'build Conditional DETR (arXiv:2108.06152)', compared=False, first=True),
    ),
    *topic('Deformable DETR (arXiv:2010.04159; any of these flags chooses it)', NETWORK, DEFORMABLE)(
        Flag('deformable', SWITCH, False, 'build Deformable DETR without further options', chooses=ALWAYS, compared=False, first=True),
        Flag('with_box_refine', SWITCH, False, 'let each decoder layer refine the boxes of the layer before', chooses=ALWAYS),
        Flag('two_stage', SWITCH, False, "make queries from the encoder's best proposals", needs='with_box_refine', chooses=ALWAYS),
        Flag('mixed_selection', SWITCH, False, 'take only the positions of two-stage queries from proposals, and learn their content', needs='two_stage', chooses=ALWAYS),
        Flag('look_forward_twice', SWITCH, False, 'let the box loss of a layer also train the refinement of the layer before', needs='with_box_refine', chooses=ALWAYS, compared=False),
        Flag('num_feature_levels', int_range(1, 16), ByFamily(None, None, 4), "number of feature maps; 1 is the backbone's last, more are its maps from the second stage on and strided convolutions of the last", chooses=ALWAYS),
        Flag('finest_stride', (4, 8), Usual('4 with 5 levels of a ViT, else 8', lambda a: 4 if has_pyramid(a) else 8),
             "stride in pixels of the finest of several feature maps; 4 adds that of the backbone's first stage", command=False),
        Flag('input_proj_bias', YES_NO, Usual('no with --co_aux_heads, else yes, as official', lambda a: not a.co_aux_heads),
             'give the projections of feature maps biases', compared=False, command=False),
        *(Flag(variant.name, SWITCH, False, f'{variant.help}; implies {implied(variant)}', chooses=ALWAYS) for variant in VARIANTS),
        Flag('enc_n_points', int_range(1, 1000), 4, 'points that an attention head of the encoder samples on each level', hidden=True),
        Flag('dec_n_points', int_range(1, 1000), 4, 'points that an attention head of the decoder samples on each level', hidden=True),
    ),
    *topic('backbone', NETWORK)(
        Flag('backbone', TEXT, 'resnet50', 'network that extracts features: resnet10, any ResNet of torchvision (resnet18 ... resnet152, resnext..., wide_resnet...), mobilenet_v2, swin_tiny, swin_small, swin_base, swin_large (the last two also with _window12), or timm/NAME for any feature network of timm', metavar='NAME'),
        Flag('backbone_weights', TEXT, 'imagenet', 'initial weights of the backbone: imagenet (downloaded), none (random), or a file of a state dict under the names of torchvision, timm or official Swin; not read when a checkpoint is loaded', compared=False, adopted=False, launch=True, aliases=('pretrained_backbone_path',), metavar='SOURCE'),
        Flag('backbone_norm', ('frozen', 'batch', 'group'), 'frozen', 'norm layers of the backbone: frozen batch norms, with stem and first stage frozen too (official), or batch or group norms with everything trained, for training from scratch; Swin always has layer norms', compared=False, some_backbones=True),
        Flag('backbone_stages', (2, 3, 4), 4, 'number of stages of the backbone; 4 ends at stride 32, 3 at 16, 2 at 8', some_backbones=True),
        Flag('dilation', SWITCH, False, 'dilate the last stage of the backbone instead of striding it (DC5, stride 16)', some_backbones=True),
        Flag('drop_path_rate', float_range(0, 1, below=True), 0.2, 'probability that the last block of Swin is skipped while training; it grows linearly from 0 over the blocks', some_backbones=True, compared=False),
        Flag('position_embedding', ('sine', 'learned', 'v2', 'v3'), 'sine', 'position encoding of the feature maps; v2 = sine, v3 = learned', same={'v2': 'sine', 'v3': 'learned'}, hidden=True),
        Flag('pe_temperature', float_range(1e-06), 10000.0, 'temperature of sine encodings; about 20 resolves positions better on small feature maps'),
        Flag('position_embedding_scale', float_range(1e-06), 2 * math.pi, 'angle in radians that a whole side spans in sine encodings', unset='2 pi', hidden=True),
    ),
    *topic('transformer', NETWORK)(
        Flag('enc_layers', int_range(1, 1000), 6, 'encoder layers'),
        Flag('dec_layers', int_range(1, 1000), 6, 'decoder layers'),
        Flag('dim_feedforward', int_range(1, 10**6), Usual('1024 for deformable without --hybrid_k or --co_aux_heads, else 2048', lambda a: 2048 if a.family != 'deformable' or a.co_aux_heads or hybrid(a) else 1024),
             'hidden channels of the feed-forward blocks'),
        Flag('hidden_dim', int_range(2, 10**5), 256, 'channels of tokens and queries'),
        Flag('dropout', float_range(0, 1, below=True), Usual('0 with --co_aux_heads, else 0.1', lambda a: 0.0 if a.co_aux_heads else 0.1),
             'dropout probability in the transformer', compared=False),
        Flag('nheads', int_range(1, 10**4), 8, 'attention heads'),
        Flag('num_queries', int_range(1, 10**5), ByFamily(100, 300, 300), 'number of object queries, the most objects an image can get', compared=False, aliases=('num_queries_one2one',)),
        Flag('pre_norm', SWITCH, False, 'put norms in front of the sub-layers', families=DETR, hidden=True),
        Flag('use_checkpoint', ('backbone', 'encoder', 'decoder'), None, 'recompute activations in the backward pass instead of keeping them, which saves memory and takes about a third more time; PART is any of backbone, encoder and decoder, none named means all', unset='recompute nothing', compared=False, adopted=False, nargs='*', metavar='PART'),
    ),
    *topic('mixed supervision (MS-DETR, arXiv:2401.03989; Deformable or Conditional DETR)', NETWORK, QUERIES)(
        Flag('use_ms_detr', SWITCH, False, 'predict from the queries a second time while training, and supervise that one-to-many', chooses=UNLESS_CONDITIONAL, compared=BY_NAMES),
        Flag('ms_variant', ('a', 'b'), 'b', 'where --use_ms_detr predicts a second time: b after the cross-attention, which moves in front of the self-attention, at inference too; a at the output of each layer, with class heads of their own', needs='use_ms_detr', compared=BY_NAMES),
        Flag('use_aux_ffn', SWITCH, False, 'give the second predictions of --ms_variant b a feed-forward block of their own', needs='use_ms_detr', compared=False),
    ),
    *topic('detections', DETECTION)(
        Flag('masks', SWITCH, False, 'predict a mask for each query of the decoder too (DETR, Sec. 4.4; any family); training data need segmentations'),
        Flag('co_masks', SWITCH, False, 'predict masks of the detections from their RoI features (ViT models of Co-DETR); training data need segmentations', families=DEFORMABLE),
        Flag('topk_eval', int_range(1, 10**6), 100, 'number of detections kept per image (not DETR, which gives one per query)', aliases=('topk',)),
        Flag('nms_iou_threshold', float_range(0, 1), None, 'suppress detections that overlap a better one of their class by more than this IoU', unset='no suppression', families=QUERIES, hidden=True),
        Flag('soft_nms_threshold', float_range(0, 1), 0.0,
             'lower the scores of detections that overlap a better one of their class by this IoU or more (0 turns it off)', families=DEFORMABLE, hidden=True),
        Flag('clamp_boxes', YES_NO, Usual('yes with --co_aux_heads, else no, as official', lambda a: bool(a.co_aux_heads)),
             'clip detections to the image', families=DEFORMABLE, hidden=True),
        Flag('eval_module', ('detr', 'faster_rcnn', 'atss'), 'detr', 'module that detects outside training: the decoder (detr), or one of --co_aux_heads, with 100 boxes per image after its own NMS', families=DEFORMABLE, adopted=False),
    ),
    *topic('optimization', TRAINING)(
        Flag('epochs', int_range(1), ByFamily(300, 50, 50), 'passes over the training images', first=True),
        Flag('batch_size', int_range(1, 10**5), 2, 'images per process and forward pass', first=True),
        Flag('total_batch_size', int_range(1, 10**7), None, 'images per optimizer step over all processes: batches are accumulated until there are as many', unset='--batch_size x processes'),
        Flag('accum_steps', int_range(1, 10**6), 1, 'batches per optimizer step, which --total_batch_size makes', command=False),
        Flag('lr', float_range(), ByFamily(1e-4, 1e-4, 2e-4), 'learning rate', first=True),
        Flag('lr_backbone', float_range(), ByFamily(1e-5, 1e-5, 2e-5), 'learning rate of the backbone; 0 freezes it'),
        Flag('freeze', TEXT, [], 'do not train these parts: backbone, encoder, decoder, or any words between the dots of parameter names, such as decoder.layers.0', unset='all is trained that the backbone does not freeze itself', nargs='+', metavar='PART'),
        Flag('lr_backbone_names', TEXT, ByFamily(['backbone'], ['backbone'], ['backbone.0']),
             'a parameter belongs to the backbone if its name contains one of these', nargs='+', metavar='PART', hidden=True),
        Flag('lr_linear_proj_names', TEXT, ByFamily([], [], ['reference_points', 'sampling_offsets']),
             'a parameter learns at --lr times --lr_linear_proj_mult if its name contains one of these', nargs='*', metavar='PART', hidden=True),
        Flag('lr_linear_proj_mult', float_range(), 0.1, 'factor of the learning rate for --lr_linear_proj_names'),
        Flag('sgd', SWITCH, False, 'use SGD with momentum 0.9 instead of AdamW', hidden=True),
        Flag('weight_decay', float_range(), 0.0001, 'weight decay of all parameters'),
        Flag('lr_schedule', ('step', 'cosine'), 'step',
             'step divides the learning rate by 10 after --lr_drop epochs; cosine lowers it to 0 over all --epochs'),
        Flag('lr_drop', int_range(1), ByFamily(200, 40, 40), 'epochs after which the learning rate is divided by 10'),
        Flag('lr_drop_epochs', int_range(1), None, 'divide the learning rate by 10 after each of these epochs', unset='every --lr_drop epochs', nargs='+', metavar='EPOCH'),
        Flag('warmup_steps', int_range(0), 0, 'raise the learning rate linearly over the first N optimizer steps', metavar='N'),
        Flag('warmup_start', float_range(0, 1), 0.0, 'factor of the learning rate in the first of --warmup_steps', unset='0, one step above 0', needs='warmup_steps', metavar='FACTOR'),
        Flag('lr_layer_decay', float_range(1e-06, 1), None, 'multiply the learning rate by FACTOR for each block of a ViT, counted from the last, and decay no biases and norms; --lr_backbone is not used then', unset='no such factor', some_backbones=True, metavar='FACTOR'),
        Flag('clip_max_norm', float_range(), 0.1, 'clip the gradient to this norm; 0 does not clip'),
        Flag('ema', float_range(0, 1, below=True), 0.0, 'decay per step of an exponential moving average of the weights, which is evaluated and saved too; usual: 0.9997', unset='0, no average', metavar='DECAY'),
        Flag('ema_warmup', int_range(0), 0, 'let the average of --ema follow the weights closely during the first steps, exponentially less over N of them; usual for ViT: 2000', unset='0, another rule for about 10 steps', needs='ema', metavar='N'),
    ),
    *topic('matching costs', TRAINING)(
        Flag('set_cost_class', float_range(), ByFamily(1.0, 2.0, 2.0), 'weight of the class in the matching cost', hidden=True),
        Flag('set_cost_bbox', float_range(), 5, 'weight of the L1 distance of boxes in the matching cost', hidden=True),
        Flag('set_cost_giou', float_range(), 2, 'weight of the generalized IoU in the matching cost', hidden=True),
        Flag('enc_match', ('boxes', 'anchors'), Usual('anchors with --use_ms_detr, else boxes', lambda a: 'anchors' if a.use_ms_detr and a.two_stage else 'boxes'),
             'boxes of encoder proposals that are matched with the objects: boxes are refined ones, compared by class too; anchors are those before refinement, compared by place alone', needs='two_stage', families=DEFORMABLE, command=False),
    ),
    *topic('losses (a term of coefficient 0 does not exist)', TRAINING)(
        Flag('aux_loss', SWITCH, True, 'supervise the last decoder layer only', kind=NETWORK, compared=False, adopted=False, option='no_aux_loss', hidden=True),
        Flag('cls_loss_coef', float_range(), ByFamily(1.0, 2.0, 2.0), 'coefficient of the class loss'),
        *(Flag(f'{term}_loss_coef', float_range(), coef, f'coefficient of {title}', hidden=True) for term, (coef, title) in BOX_TERMS.items()),
        Flag('mask_loss_coef', float_range(), 1.0, 'coefficient of the focal loss of masks', hidden=True),
        Flag('dice_loss_coef', float_range(), 1.0, 'coefficient of the Dice loss of masks', hidden=True),
        Flag('co_mask_loss_coef', float_range(), 12.0, 'coefficient of the masks of --co_masks; 15.96 in the official COCO model', needs='co_masks', families=DEFORMABLE, hidden=True),
        Flag('co_mask_iou_loss_coef', float_range(), 6.0, "coefficient of the predicted IoU of --co_masks's masks", needs='co_masks', families=DEFORMABLE, command=False),
        Flag('eos_coef', float_range(), 0.1, "weight of the class 'no object' in the class loss", families=DETR, hidden=True),
        Flag('class_loss', ('focal', 'quality_focal'), 'focal',
             'class loss of Deformable DETR (the other families have one each); in quality_focal the target of a positive is the IoU of its box', families=DEFORMABLE, command=False),
        Flag('focal_alpha', float_range(0, 1), 0.25, 'weight of positives in the focal loss', families=QUERIES, hidden=True),
    ),
    *topic('hybrid matching (H-DETR, arXiv:2207.13080; Deformable or Conditional DETR)', TRAINING, QUERIES)(
        Flag('hybrid_k', int_range(0, 1000), Usual('5 with --hybrid_queries, else 0', lambda a: (5 if getattr(a, 'hybrid_queries', 0) else 0) if hybrid(a) else None),
             'train a second group of queries, of which K are matched to each object; 0 trains none', chooses=UNLESS_CONDITIONAL, aliases=('k_one2many',), metavar='K'),
        Flag('hybrid_queries', int_range(0, 10**5), Usual('1500 with --hybrid_k, else 0', lambda a: (1500 if a.hybrid_k else 0) if hybrid(a) else None),
             'number of queries in the group of --hybrid_k', chooses=UNLESS_CONDITIONAL, aliases=('num_queries_one2many',), metavar='N'),
        Flag('hybrid_lambda', float_range(), Usual('1', lambda a: 1.0 if hybrid(a) else None), 'factor of the losses of the group of --hybrid_k', chooses=UNLESS_CONDITIONAL, aliases=('lambda_one2many',), metavar='FACTOR'),
    ),
    *topic('groups of queries (Group DETR, arXiv:2207.13085; any family)', TRAINING)(
        Flag('group_detr', int_range(1, 1000), 1, 'train G groups of --num_queries queries, each matched one-to-one', metavar='G'),
    ),
    *topic('contrastive denoising (DINO, arXiv:2203.03605; Deformable DETR in two stages)', TRAINING, DEFORMABLE)(
        Flag('dn_number', int_range(0, 10**5), 0, 'add queries that reconstruct noised objects, about N positives and N negatives per image; 0 adds none, usual: 100', needs='two_stage', chooses=ALWAYS, metavar='N'),
        Flag('dn_label_noise_ratio', float_range(0, 2), 0.5, 'twice the share of labels that denoising replaces by random ones', needs='dn_number', hidden=True),
        Flag('dn_box_noise_scale', float_range(), 1.0, 'largest displacement of the corners of noised boxes, as a multiple of half the side', needs='dn_number'),
    ),
    *topic('collaborative heads (Co-DETR, arXiv:2211.12860; Deformable DETR in two stages)', TRAINING, DEFORMABLE)(
        Flag('co_aux_heads', ('faster_rcnn', 'atss'), [], "detectors to train on the encoder's output, whose positives become decoder queries: faster_rcnn, atss or both", unset='none', needs='two_stage', chooses=ALWAYS, kind=NETWORK, compared=False, adopted='eval_module', nargs='+', metavar='HEAD'),
        Flag('co_rcnn_head', ('2fc', '4conv1fc'), '2fc', 'RoI head of faster_rcnn. 2fc: two layers, a box for each class; 4conv1fc: four convolutions and a layer, one box for all classes (ViT on COCO)', needs='co_aux_heads'),
        Flag('co_rcnn_masks', SWITCH, False, 'train masks of the positive RoIs of faster_rcnn too (co_deformable_detr_mask_r50); only --eval_module faster_rcnn predicts them', needs='co_aux_heads'),
        Flag('lambda_1', float_range(), 1.0, 'factor of the losses of queries made from positives of --co_aux_heads', needs='co_aux_heads', hidden=True),
        Flag('lambda_2', float_range(), 2.0, 'factor of the losses of --co_aux_heads themselves, times --dec_layers', needs='co_aux_heads', hidden=True),
        Flag('max_pos_coords', int_range(1, 10**5), 300, 'largest number of positives of --co_aux_heads, per head and image, that become queries', needs='co_aux_heads', hidden=True),
        Flag('with_coord_feat', YES_NO, True,
             'add the feature that one of --co_aux_heads saw to the content of its queries', needs='co_aux_heads', command=False),
    ),
    *topic('one-to-many matching of --use_ms_detr', TRAINING, QUERIES)(
        Flag('o2m_matcher_k', int_range(1, 10**4), 6, 'largest number of queries that one-to-many matching gives an object', needs='use_ms_detr', hidden=True),
        Flag('o2m_matcher_threshold', float_range(), 0.4, 'smallest one-to-many score with which a query is positive for its best object', needs='use_ms_detr', hidden=True),
        Flag('use_indices_merge', SWITCH, False, 'add the pairs of the one-to-one matching for queries without a one-to-many pair', needs='use_ms_detr', hidden=True),
        *(flag for term in ('cls', *BOX_TERMS) for flag in coefficients_of(term)),
    ),
    *topic('precision, memory, processes', RUN)(
        Flag('amp', ('off', 'bf16', 'fp16'), 'off', '16-bit arithmetic in the model; boxes, matching and losses stay in float32', first=True),
        Flag('tf32', YES_NO, None, 'compute float32 products of NVIDIA GPUs with 10 bits of the mantissa, several times as fast', unset="in convolutions only, PyTorch's default"),
        Flag('compile', SWITCH, False, 'torch.compile of backbone stages and transformer layers, for any image size; the first steps take minutes', launch=True),
        Flag('fsdp', SWITCH, False, 'keep a part of the weights, gradients and optimizer states in each process (FSDP2), for models that do not fit; checkpoints are the same', launch=True),
        Flag('worst_batch_first', YES_NO, None, 'try a batch of the largest images with the most objects before the first step, so that a lack of memory shows at once', unset='on GPUs', hidden=True, launch=True),
    ),
    *topic('evaluation', RUN)(
        Flag('eval', SWITCH, False, 'evaluate --resume or --pretrained, then stop', first=True, launch=True),
        Flag('eval_every', int_range(0), 1, 'epochs between evaluations; the last epoch is always evaluated; 0: train without evaluating, and read no validation data'),
        Flag('patience', int_range(1), None, 'stop after N evaluations without a better AP of boxes (the main number of --evaluator)', unset='train all epochs', metavar='N'),
        Flag('evaluator', ('coco', 'lvis'), Usual('lvis with --dataset_file lvis, else coco', lambda a: 'lvis' if getattr(a, 'dataset_file', '') == 'lvis' else 'coco'),
             'rules by which metrics are computed', hidden=True),
    ),
    *topic('run', RUN)(
        Flag('output_dir', TEXT, '', 'folder of checkpoints, metrics.csv, log.jsonl and drawn images; nothing is written without it', metavar='DIR', first=True, launch=True),
        Flag('resume', TEXT, '', 'go on with this checkpoint (path or address): weights, optimizer, schedule, random numbers; auto: the one in --output_dir, if any', metavar='FILE', first=True, launch=True),
        Flag('pretrained', TEXT, '', 'start from these weights (path or address); heads of another number of classes start anew', metavar='FILE', first=True, launch=True),
        Flag('allow_http', SWITCH, False, 'fetch from http:// addresses too, though anybody on the way can change what comes', unset='https alone', launch=True),
        Flag('config', TEXT, '', 'take all flags of this file that are not given: OUT/flags.json of a run, or JSON of flags and values', metavar='FILE', launch=True),
        Flag('frozen_weights', TEXT, None, 'start from these weights of boxes, and train the heads of --masks alone', metavar='FILE'),
        Flag('recipe', TEXT, '', 'take all flags of scripts/NAME.sh that are not given, as `bash scripts/NAME.sh` does', metavar='NAME', first=True, launch=True),
        Flag('model', TEXT, '', 'take all flags of the recipe behind a hub entry of docs/zoo.md but its data, and start from its published weights unless --resume or --pretrained names others', metavar='NAME', first=True, launch=True),
        Flag('dry_run', SWITCH, False, 'print parameters, FLOPs, memory, learning rates and steps, then stop: nothing is read, downloaded or trained', launch=True),
        Flag('save_every', int_range(1), None, 'keep a numbered checkpoint every N epochs, and at each drop of the learning rate', unset='only the last and the best are kept', metavar='N'),
        Flag('checkpoint_steps', int_range(1), None, 'write checkpoint.pth every N steps of an epoch too', unset='after each epoch, and when the run is asked to stop', metavar='N'),
        Flag('keep_checkpoints', int_range(1), None, 'keep only the newest N numbered checkpoints', unset='all', metavar='N'),
        Flag('bad_steps', int_range(1), 3, 'stop after N steps in a row whose gradient is not finite; each of them is left out, and its batch is saved in --output_dir for tools/replay.py', metavar='N', hidden=True),
        Flag('device', TEXT, 'auto', 'cuda, mps or cpu; auto takes the first there is', first=True, launch=True),
        Flag('seed', int_range(0, 2**63 - 1), 42, 'seed of all random numbers'),
        Flag('print_freq', int_range(1), 10, 'optimizer steps between two progress lines', launch=True),
        Flag('tensorboard', SWITCH, False, 'write TensorBoard events into --output_dir'),
        Flag('wandb', TEXT, '', 'log to this project of Weights & Biases too', metavar='PROJECT'),
        Flag('dist_url', TEXT, 'env://', 'address where processes meet (as torchrun says)', hidden=True, launch=True),
    ),
)}
# fmt: on

# Flags that trust a file more than usual: only a command line sets them, never a checkpoint.
TRUST = ('allow_outside', 'allow_pipe', 'allow_http')

# Names that a command line may hold and that are no options: arguments of a class alone, and merged or dropped flags of ours.
NO_OPTIONS = {
    name: f'{flag.help} (an argument of its class; only a checkpoint or a namespace sets it)'
    for name, flag in FLAGS.items()
    if not flag.command and name != 'num_classes'
} | {
    'local_init': 'its gain for small models was never part of a recipe, and is gone: leave it out',
}
