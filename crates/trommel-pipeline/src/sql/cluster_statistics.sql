-- Size and tightness of each cluster in the corpus; inner nodes of the tree count the windows below them.
-- in:  assignments(source, cluster_id, byte_len, distance, ...), tree(cluster_id, parent_id, level, leaf, centroid)
-- out: cluster_id, windows, bytes, mean_distance (null for an inner node and for an empty cluster)
WITH RECURSIVE counts AS (
  SELECT cluster_id, count(*) AS windows, sum(CAST(byte_len AS BIGINT)) AS bytes, avg(CAST(distance AS DOUBLE)) AS mean_distance
  FROM assignments WHERE source = 'corpus' GROUP BY cluster_id
), below AS (
  SELECT cluster_id AS leaf_id, cluster_id AS node_id FROM tree WHERE leaf
  UNION ALL
  SELECT below.leaf_id, tree.parent_id AS node_id FROM below JOIN tree ON tree.cluster_id = below.node_id
  WHERE tree.parent_id IS NOT NULL
)
SELECT tree.cluster_id,
       CAST(coalesce(sum(counts.windows), 0) AS BIGINT) AS windows,
       CAST(coalesce(sum(counts.bytes), 0) AS BIGINT) AS bytes,
       CASE WHEN tree.leaf THEN max(counts.mean_distance) END AS mean_distance
FROM tree JOIN below ON below.node_id = tree.cluster_id
LEFT JOIN counts ON counts.cluster_id = below.leaf_id
GROUP BY tree.cluster_id, tree.leaf
ORDER BY tree.cluster_id
