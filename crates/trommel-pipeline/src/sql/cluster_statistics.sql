-- Size and tightness of each cluster in the corpus; inner nodes of the tree count the windows below them.
-- in:  counts(domain, cluster_id, windows, bytes, distance), tree(cluster_id, parent_id, level, leaf, centroid)
-- out: cluster_id, windows, bytes, mean_distance (null for an inner node and for an empty cluster)
WITH RECURSIVE corpus AS (
  SELECT cluster_id, windows, bytes, distance / windows AS mean_distance FROM counts WHERE domain = 'corpus'
), below AS (
  SELECT cluster_id AS leaf_id, cluster_id AS node_id FROM tree WHERE leaf
  UNION ALL
  SELECT below.leaf_id, tree.parent_id AS node_id FROM below JOIN tree ON tree.cluster_id = below.node_id
  WHERE tree.parent_id IS NOT NULL
)
SELECT tree.cluster_id,
       CAST(coalesce(sum(corpus.windows), 0) AS BIGINT) AS windows,
       CAST(coalesce(sum(corpus.bytes), 0) AS BIGINT) AS bytes,
       CASE WHEN tree.leaf THEN max(corpus.mean_distance) END AS mean_distance
FROM tree JOIN below ON below.node_id = tree.cluster_id
LEFT JOIN corpus ON corpus.cluster_id = below.leaf_id
GROUP BY tree.cluster_id, tree.leaf
ORDER BY tree.cluster_id
